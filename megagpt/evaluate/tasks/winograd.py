"""Winograd schemas: what a pronoun stands for (Levesque et al. 2012), scored as Trinh and Le 2018 do."""

from __future__ import annotations

from megagpt.evaluate.choices import Choices, choose
from megagpt.evaluate.task import Doc, Task, json_lines


def full(doc: Doc) -> Choices:
    """The whole sentence."""
    options = tuple(("", f"{context} {doc['continuation']}") for context in doc["context_options"])
    return Choices(options, doc["gold"])


def partial(doc: Doc) -> Choices:
    """What follows the pronoun."""
    options = tuple((context, " " + doc["continuation"]) for context in doc["context_options"])
    return Choices(options, doc["gold"])


TASKS = tuple(
    Task(
        name=f"winograd_{made.__name__}",
        about="what a pronoun stands for",
        protocol=f"likelier {what} ({made.__name__} scoring); GPT-2 paper",
        source="Levesque et al. 2012; winograd_wsc.jsonl of llm-foundry's scripts/eval/local_data",
        files=("icl/winograd_wsc.jsonl",),
        example=(
            '{"context_options": ["The cup is not in the box: the cup", "The cup is not in the box: the box"], '
            '"continuation": "is small.", "gold": 1}',
        ),
        read=lambda paths: json_lines(paths, "context_options", "continuation", "gold"),
        ask=choose(made),
    )
    for made, what in ((full, "sentence"), (partial, "rest of the sentence"))
)
