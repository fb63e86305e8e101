"""LAMBADA: the last word of a passage, which only the whole of it gives away (Paperno et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from megagpt.evaluate.answers import Answers
from megagpt.evaluate.choices import finish
from megagpt.evaluate.task import Doc, Record, Task, json_lines, mean, perplexity, text_of
from megagpt.evaluate.writing import greedy

NEVER = -1e4  # added to a logit
FIGURES = {"acc": mean("acc"), "ppl": perplexity()}


def last_word(doc: Doc) -> tuple[str, str]:
    """The passage without its last word, and the word with the blank before it."""
    context, word = doc["text"].rsplit(" ", 1)
    return context, " " + word


def stop_words() -> list[str]:
    """Common English ones, a list of ours: the GPT-2 paper does not give its own."""
    return (resources.files("megagpt") / "evaluate" / "stop_words.txt").read_text().split()


def last_token(answers: Answers, docs: Sequence[Doc], shots: Sequence[Sequence[Doc]]) -> list[Record]:
    """Whether the model's likeliest token after all others is the last one, and how likely that is.

    Comm: those of `Answers`.
    """
    begun, encode, decode = answers.trained.bounds.begun, answers.tokenizer.encode, answers.tokenizer.decode
    texts = [encode(doc["text"]) for doc in docs]
    scores = answers.scores([(begun(ids[:-1]), ids[-1:]) for ids in texts])
    return [
        {
            "prompt": decode(ids[:-1]),
            "continuation": decode(ids[-1:]),
            "n_tokens": 1,
            "logprob": score.logprob,
            "acc": float(score.greedy),
        }
        for ids, score in zip(texts, scores, strict=True)
    ]


def last_token_filtered(answers: Answers, docs: Sequence[Doc], shots: Sequence[Sequence[Doc]]) -> list[Record]:
    """Likewise, but the likeliest token of those that are no stop word; acc_all: of all tokens.

    Comm: those of `Answers`.
    """
    encode = answers.tokenizer.encode
    never = {ids[0]: NEVER for word in stop_words() if len(ids := encode(" " + word)) == 1}
    texts = [encode(doc["text"]) for doc in docs]
    prompts = [answers.trained.bounds.begun(ids[:-1]) for ids in texts]
    written = answers.texts(prompts, greedy(1, bias=never))
    return [
        {
            **record,
            "written": text,
            "acc_all": record["acc"],
            "acc": float(text == answers.tokenizer.decode(ids[-1:])),
        }
        for record, text, ids in zip(last_token(answers, docs, shots), written, texts, strict=True)
    ]


def plain_text(paths: Sequence[Path]) -> list[Doc]:
    """A passage a line."""
    return [{"text": line} for line in text_of(paths[0]).split("\n") if line]


OPENAI = {
    "about": "the last word of a passage",
    "source": "Paperno et al. 2016; the test set as OpenAI has it (lambada_test.jsonl)",
    "files": ("lambada/lambada_test.jsonl",),
    "example": ('{"text": "Ann took her red scarf off. Who had seen it, she asked later. Nobody had seen the scarf"}',),
    "read": lambda paths: json_lines(paths, "text"),
}

TASKS = (
    Task(
        name="lambada_openai",
        protocol="whole last word, greedy; OpenAI's text; as lm-eval's task of this name",
        ask=finish(last_word),
        figures=FIGURES,
        **OPENAI,
    ),
    Task(
        name="lambada_standard",
        about="the last word of a passage",
        protocol="whole last word, greedy; original text, tokenised and in lower case; as lm-eval's task of this name",
        source="Paperno et al. 2016; lambada_test_plain_text.txt of the authors' lambada-dataset.tar.gz",
        files=("lambada/lambada_test_plain_text.txt",),
        example=("ann took her red scarf off . `` who has seen it ? '' she asked later . nobody had seen the scarf\n",),
        read=plain_text,
        ask=finish(last_word),
        figures=FIGURES,
    ),
    Task(
        name="lambada_last_token",
        protocol="last token instead of last word; OpenAI's text",
        ask=last_token,
        figures=FIGURES,
        **OPENAI,
    ),
    Task(
        name="lambada_gpt2",
        protocol="last token, the likeliest that is no stop word (a list of ours); OpenAI's text; GPT-2 paper",
        ask=last_token_filtered,
        figures={**FIGURES, "acc_all": mean("acc_all")},
        **OPENAI,
    ),
)
