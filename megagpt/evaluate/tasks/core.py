"""CORE: the mean of 22 tasks, each freed of what guessing gets right (Li et al. 2024); core.yaml lists them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from megagpt.evaluate.answers import Answers
from megagpt.evaluate.choices import best
from megagpt.evaluate.score import Pair, Score
from megagpt.evaluate.task import Doc, Record, Task, json_lines, mean
from megagpt.generate.batching import common

ORDER = 1337  # seed of the order of a file's documents, as nanochat has it: the examples before each are then the same

KEYS = {
    "choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "text": ("context", "continuation"),
}


@dataclass(frozen=True, kw_only=True)
class Part:
    """A line of core.yaml.

    kind: choice: of continuations; schema: of beginnings, by what follows them; text: to be written word by word.
    baseline: percentage that guessing gets right.
    """

    name: str
    kind: Literal["choice", "schema", "text"]
    file: str
    shots: int = 0
    delimiter: str = " "
    baseline: float = 0.0

    def texts(self, doc: Doc) -> list[str]:
        """A document with each of its answers; of kind text: without its answer, and with it."""
        if self.kind == "choice":
            return [doc["query"] + self.delimiter + choice for choice in doc["choices"]]
        if self.kind == "schema":
            return [context + self.delimiter + doc["continuation"] for context in doc["context_options"]]
        before = doc["context"].strip() + self.delimiter
        return [before.rstrip(), before + doc["continuation"]]

    def shown(self, doc: Doc) -> str:
        """As an example before another one."""
        return self.texts(doc)[1 if self.kind == "text" else doc["gold"]] + "\n\n"

    def pairs(self, ids: Sequence[tuple[int, ...]]) -> list[Pair]:
        """Of the texts' token ids: what is scored, after what.

        A choice: what is not alike at the beginning of all.  A schema: what is alike at the end of all.
        """
        least = min(map(len, ids)) - 1
        if self.kind == "schema":
            n = min(least, *(common(ids[0][::-1], other[::-1]) for other in ids[1:]))
            return [(one[:-n], one[-n:]) for one in ids]
        n = min(least if self.kind == "choice" else len(ids[0]), *(common(ids[0], other) for other in ids[1:]))
        return [(one[:n], one[n:]) for one in (ids if self.kind == "choice" else ids[1:])]

    def record(self, doc: Doc, scores: Sequence[Score]) -> Record:
        """acc: whether the answer with the highest mean log-probability a token is right; of text: each token is."""
        if self.kind == "text":
            return {"acc": float(scores[0].greedy), "logprobs": [scores[0].logprob]}
        means = [score.logprob / len(score.logprobs) for score in scores]
        return {"gold": doc["gold"], "choice": best(means), "acc": float(best(means) == doc["gold"]), "logprobs": means}

    def ask(self, answers: Answers, docs: Sequence[Doc], shots: Sequence[Sequence[Doc]]) -> list[Record]:
        """All documents."""
        before = ["".join(map(self.shown, some)) for some in shots]
        texts = [[begin + text for text in self.texts(doc)] for doc, begin in zip(docs, before, strict=True)]
        pairs = [self.pairs([(*answers.empty, *answers.tokenizer.encode(t)) for t in some]) for some in texts]
        scores = iter(answers.scores([pair for some in pairs for pair in some]))
        return [
            {**self.question(doc, begin), **self.record(doc, [next(scores) for _ in some])}
            for doc, begin, some in zip(docs, before, pairs, strict=True)
        ]

    def question(self, doc: Doc, begin: str) -> Record:
        """What was asked, for the user to read.  begin: the examples before it."""
        texts = self.texts(doc)
        if self.kind == "text":
            return {"prompt": begin + texts[0], "continuation": texts[1][len(texts[0]) :]}
        if self.kind == "choice":
            return {"prompt": begin + doc["query"], "choices": [text[len(doc["query"]) :] for text in texts]}
        ends = [text[len(context) :] for text, context in zip(texts, doc["context_options"], strict=True)]
        return {"prompt": begin, "contexts": doc["context_options"], "choices": ends}

    def read(self, paths: Sequence[Path]) -> list[Doc]:
        """In an order that says nothing."""
        docs = json_lines(paths, *KEYS[self.kind])
        random.Random(ORDER).shuffle(docs)
        return docs

    @property
    def task(self) -> Task:
        """By itself."""
        return Task(
            name=f"core_{self.name}",
            about=f"a part of CORE: {self.name}",
            protocol=f"{PROTOCOLS[self.kind]}; centred: of what guessing ({self.baseline:g}%) leaves",
            source=f"Li et al. 2024; {self.file}.jsonl of llm-foundry's scripts/eval/local_data",
            files=(f"icl/{self.file}.jsonl",),
            example=(EXAMPLES[self.kind],),
            read=self.read,
            ask=self.ask,
            figures={"centred": centred(self.baseline / 100), "acc": mean("acc")},
            shots=self.shots,
        )


EXAMPLES = {
    "choice": '{"query": "Question: Which is a rock?", "choices": ["granite", "a cat"], "gold": 0}',
    "schema": '{"context_options": ["The cup is not in the box: the cup", "The cup is not in the box: the box"], '
    '"continuation": "is small.", "gold": 1}',
    "text": '{"context": "Question: What is the capital of France?", "continuation": "Paris"}',
}

PROTOCOLS = {
    "choice": "the answer with the highest mean log-probability a token",
    "schema": "the beginning that makes the rest likelier",
    "text": "each token of the answer, greedy",
}


def centred(baseline: float) -> Callable[[Sequence[Record]], float]:
    """Accuracy, as the share of what guessing leaves that is got right: 0 for guessing, 1 for all."""
    accuracy = mean("acc")
    return lambda records: (accuracy(records) - baseline) / (1 - baseline)


def parts() -> list[Part]:
    """Those of core.yaml."""
    lines: list[dict[str, Any]] = yaml.safe_load((resources.files("megagpt") / "evaluate" / "core.yaml").read_text())
    return [Part(**line) for line in lines]


PARTS = tuple(part.task for part in parts())

TASKS = (
    *PARTS,
    Task(
        name="core",
        about="the mean of the 22 parts of CORE, each by its centred accuracy",
        protocol="as DCLM and nanochat have it",
        source="Li et al. 2024; llm-foundry's scripts/eval/local_data, its files without their folders",
        parts=PARTS,
    ),
)
