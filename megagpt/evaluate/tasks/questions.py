"""Questions whose answers are written: Natural Questions (Kwiatkowski et al. 2019), CoQA (Reddy et al. 2019)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megagpt.errors import UserError
from megagpt.evaluate.task import Doc, Record, Task, json_lines, mean, text_of
from megagpt.evaluate.writing import exact, greedy, over_annotators, overlap, words, write


def nq(doc: Doc) -> tuple[str, str]:
    """As lm-eval asks it."""
    return f"Q: {doc['question']}?\nA:", " " + doc["answer"][0]


def turns(paths: Sequence[Path]) -> list[Doc]:
    """Each question of each dialogue: all before it, and its answers, of the first annotator and of the others."""
    path = paths[0]
    found = []
    try:
        for dialogue in json.loads(text_of(path))["data"]:
            questions = [turn["input_text"] for turn in dialogue["questions"]]
            by_annotator = [dialogue["answers"], *dialogue.get("additional_answers", {}).values()]
            answers = [[turn["input_text"] for turn in one] for one in by_annotator]
            for i in range(len(questions)):
                said = "".join(f"Q: {q}\n\nA: {a}\n\n" for q, a in zip(questions[:i], answers[0][:i], strict=True))
                golds: dict[str, str] = {}
                for one in answers:
                    golds.setdefault(one[i].lower(), one[i])
                prompt = f"{dialogue['story']}\n\n{said}Q: {questions[i]}\n\nA:"
                found.append({"prompt": prompt, "golds": list(golds.values()), "last": i == len(questions) - 1})
    except (json.JSONDecodeError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path}: {error!r}", "wanted CoQA's dialogues", "get the file anew") from None
    return found


def agreed(doc: Doc, text: str) -> Record:
    """F1 and exact match of its first line."""
    line = text.strip().split("\n")[0]
    return {
        "golds": doc["golds"],
        "f1": over_annotators(overlap, line, doc["golds"]),
        "em": over_annotators(lambda a, b: float(words(a) == words(b)), line, doc["golds"]),
    }


def _coqa(name: str, only_last: bool, protocol: str) -> Task:
    return Task(
        name=name,
        about="a question about a story, after others",
        protocol=protocol,
        source="Reddy et al. 2019; coqa-dev-v1.0.json of the authors",
        files=("coqa/coqa-dev-v1.0.json",),
        example=(
            '{"data": [{"story": "Ann fed the hens.", "questions": [{"input_text": "Who did it?"}, '
            '{"input_text": "What?"}], "answers": [{"input_text": "Ann"}, {"input_text": "fed hens"}]}]}',
        ),
        read=lambda paths: [doc for doc in turns(paths) if doc["last"] or not only_last],
        ask=write(lambda doc: (doc["prompt"], " " + doc["golds"][0]), agreed, greedy(256, "\nQ:")),
        figures={"f1": mean("f1"), "em": mean("em")},
    )


TASKS = (
    Task(
        name="nq_open",
        about="a question, without a text that answers it",
        protocol="written greedily, 64 tokens at most; exact match with any answer, case, punctuation, articles aside; "
        "prompts and match as lm-eval's task, examples from the same file",
        source="Kwiatkowski et al. 2019; NQ-open.dev.jsonl of natural-questions/nq_open",
        files=("nq_open/NQ-open.dev.jsonl",),
        example=('{"question": "what is the capital of france", "answer": ["Paris"]}',),
        read=lambda paths: json_lines(paths, "question", "answer"),
        ask=write(
            nq,
            lambda doc, text: {"golds": doc["answer"], "em": exact(text, doc["answer"])},
            greedy(64, "\n", ".", ","),
            begin="Answer these questions:\n\n",
            between="\n",
        ),
        figures={"em": mean("em")},
        shots=5,
    ),
    _coqa("coqa", True, "the last question of each dialogue, greedy; F1 of words; as lm-eval's task of this name"),
    _coqa("coqa_gpt2", False, "every question, greedy, after the story and what was said; F1 of words; GPT-2 paper"),
)
