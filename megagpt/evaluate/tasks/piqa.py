"""PIQA: which of two ways to reach an everyday goal works (Bisk et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megagpt.errors import UserError
from megagpt.evaluate.choices import Choices, choose
from megagpt.evaluate.task import Doc, Task, json_lines, mean, text_of


def read(paths: Sequence[Path]) -> list[Doc]:
    """The questions, each with its label."""
    docs, labels = json_lines(paths[:1], "goal", "sol1", "sol2"), text_of(paths[1]).split()
    if len(docs) != len(labels):
        raise UserError(
            f"{paths[0]} has {len(docs)} questions, {paths[1]} {len(labels)} labels", "wanted as many", "get both anew"
        )
    return [{**doc, "gold": int(label)} for doc, label in zip(docs, labels, strict=True)]


def question(doc: Doc) -> Choices:
    """As lm-eval asks it."""
    context = f"Question: {doc['goal']}\nAnswer:"
    return Choices(tuple((context, " " + doc[key]) for key in ("sol1", "sol2")), doc["gold"])


TASKS = (
    Task(
        name="piqa",
        about="which of two ways to a goal works",
        protocol="likeliest answer, sum (acc) and by characters (acc_norm); as lm-eval's task of this name",
        source="Bisk et al. 2020; valid.jsonl, valid-labels.lst of the authors",
        files=("piqa/valid.jsonl", "piqa/valid-labels.lst"),
        example=('{"goal": "Open a jar.", "sol1": "Turn its lid.", "sol2": "Turn its label."}', "0\n"),
        read=read,
        ask=choose(question),
        figures={"acc": mean("acc"), "acc_norm": mean("acc_norm")},
    ),
)
