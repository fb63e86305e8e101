"""ARC: questions of American science exams for school children, easy and hard to look up (Clark et al. 2018)."""

from __future__ import annotations

from megagpt.evaluate.choices import Choices, choose
from megagpt.evaluate.task import Doc, Task, json_lines, mean


def question(doc: Doc) -> Choices:
    """As lm-eval asks it; three to five choices, which the file names A, B, ... or 1, 2, ..."""
    context = f"Question: {doc['question']['stem']}\nAnswer:"
    choices = doc["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    return Choices(tuple((context, " " + choice["text"]) for choice in choices), labels.index(doc["answerKey"]))


EXAMPLE = (
    '{"question": {"stem": "Which is a rock?", "choices": [{"text": "granite", "label": "A"}, '
    '{"text": "a cat", "label": "B"}]}, "answerKey": "A"}'
)


def _task(name: str, kind: str) -> Task:
    folder = f"arc/ARC-V1-Feb2018-2/{kind}/{kind}"
    return Task(
        name=name,
        about="a question of a science exam",
        protocol="likeliest answer, sum (acc) and by characters (acc_norm); as lm-eval's task of this name",
        source=f"Clark et al. 2018; {kind}-Test.jsonl of the authors' ARC-V1-Feb2018.zip",
        files=(f"{folder}-Test.jsonl",),
        example=(EXAMPLE,),
        training=(f"{folder}-Train.jsonl",),
        read=lambda paths: json_lines(paths, "question", "answerKey"),
        ask=choose(question),
        figures={"acc": mean("acc"), "acc_norm": mean("acc_norm")},
    )


TASKS = (_task("arc_easy", "ARC-Easy"), _task("arc_challenge", "ARC-Challenge"))
