"""BoolQ and COPA, as SuperGLUE has them (Wang et al. 2019)."""

from __future__ import annotations

from megagpt.evaluate.choices import Choices, choose
from megagpt.evaluate.task import Doc, Task, json_lines

CONNECTIVES = {"cause": "because", "effect": "therefore"}


def boolq(doc: Doc) -> Choices:
    """As lm-eval asks it."""
    context = f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"
    return Choices(tuple((context, answer) for answer in (" no", " yes")), int(doc["label"]))


def copa(doc: Doc) -> Choices:
    """As lm-eval asks it, with the second blank that it has before a choice."""
    context = f"{doc['premise'].strip()[:-1]} {CONNECTIVES[doc['question']]}"
    choices = (doc["choice1"], doc["choice2"])
    return Choices(tuple((context, f"  {text[0].lower()}{text[1:]}") for text in choices), int(doc["label"]))


TASKS = (
    Task(
        name="boolq",
        about="a question about a passage, yes or no",
        protocol="likelier answer; as lm-eval's task of this name",
        source="Clark et al. 2019; val.jsonl of SuperGLUE's BoolQ.zip",
        files=("superglue/BoolQ/val.jsonl",),
        example=('{"passage": "Tin is a metal, and soft.", "question": "is tin a metal", "label": true}',),
        training=("superglue/BoolQ/train.jsonl",),
        read=lambda paths: json_lines(paths, "passage", "question", "label"),
        ask=choose(boolq),
    ),
    Task(
        name="copa",
        about="which of two is the cause, or effect",
        protocol="likelier sentence; as lm-eval's task of this name",
        source="Roemmele et al. 2011; val.jsonl of SuperGLUE's COPA.zip",
        files=("superglue/COPA/val.jsonl",),
        example=(
            '{"premise": "The man fell.", "choice1": "It hurt.", "choice2": "Rain.", "question": "effect", "label": 0}',
        ),
        training=("superglue/COPA/train.jsonl",),
        read=lambda paths: json_lines(paths, "premise", "choice1", "choice2", "question", "label"),
        ask=choose(copa),
    ),
)
