"""Children's Book Test: which of ten words was left out of a sentence, after twenty others (Hill et al. 2016)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megagpt.errors import UserError
from megagpt.evaluate.choices import Choices, choose
from megagpt.evaluate.task import Doc, Task, text_of

BLANK = "XXXXX"
JOINED = (
    *((f" {mark}", mark) for mark in (".", ",", ";", ":", "!", "?", "'s", "n't", "'ll", "'re", "'ve", "'d", "'m")),
    *(("`` ", '"'), (" ''", '"'), ("-LRB- ", "("), (" -RRB-", ")")),
)


def detokenised(text: str) -> str:
    """As it was before marks were parted from words."""
    for parted, joined in JOINED:
        text = text.replace(parted, joined)
    return text


def read(paths: Sequence[Path]) -> list[Doc]:
    """Blocks of 21 numbered lines; the last one has the blank, the answer and ten candidates."""
    found = []
    for block in filter(str.strip, text_of(paths[0]).replace("\r\n", "\n").split("\n\n")):
        lines = [line.partition(" ")[2] for line in block.strip("\n").split("\n")]
        fields = lines[-1].split("\t")
        choices = fields[-1].split("|")
        if len(lines) != 21 or len(fields) < 3 or BLANK not in fields[0] or fields[1] not in choices:
            raise UserError(
                f"{paths[0]}: {block[:60]!r} is no question", "wanted 20 sentences and one with XXXXX", "get it anew"
            )
        found.append(
            {"before": lines[:-1], "sentence": fields[0], "choices": choices, "gold": choices.index(fields[1])}
        )
    return found


def question(doc: Doc) -> Choices:
    """The word together with the rest of its sentence, after all before it."""
    before, after = doc["sentence"].split(BLANK, 1)
    said = " ".join([*doc["before"], before.strip()]).rstrip() + " "
    context = detokenised(said).rstrip()
    texts = [detokenised(said + choice + after) for choice in doc["choices"]]
    return Choices(tuple((context, text[len(context) :]) for text in texts), doc["gold"])


def _example(sentence: str, answer: str, choices: str) -> str:
    before = [f"{i} The hen laid egg {i} , and slept .\n" for i in range(1, 21)]
    return "".join(before) + f"21 {sentence}\t{answer}\t\t{choices}\n"


def _task(name: str, kind: str, words: str, example: str) -> Task:
    return Task(
        name=name,
        about=f"which of ten {words} was left out",
        protocol="the likeliest with the rest of its sentence, after 20 sentences, detokenised by rules of ours; "
        "GPT-2 paper",
        source=f"Hill et al. 2016; CBTest.tgz of the authors: cbtest_{kind}_test_2500ex.txt",
        files=(f"cbt/cbtest_{kind}_test_2500ex.txt",),
        example=(example,),
        read=read,
        ask=choose(question),
    )


CHOICES = "barn|bed|cart|cat|cow|dog|egg|field|fox|road"
NAMES = "Al|Ann|Bea|Bob|Dan|Eve|Ida|Joe|Kim|Leo"

TASKS = (
    _task("cbt_cn", "CN", "common nouns", _example("`` Then the XXXXX came , '' said Ann .", "fox", CHOICES)),
    _task("cbt_ne", "NE", "named entities", _example("`` Then the fox came , '' said XXXXX .", "Ann", NAMES)),
)
