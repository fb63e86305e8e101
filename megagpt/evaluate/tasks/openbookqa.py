"""OpenBookQA: elementary science that takes a fact and common sense (Mihaylov et al. 2018)."""

from __future__ import annotations

from megagpt.evaluate.choices import Choices, choose
from megagpt.evaluate.task import Doc, Task, json_lines, mean


def question(doc: Doc) -> Choices:
    """As lm-eval asks it: the question, or beginning of a sentence, as it is."""
    choices = doc["question"]["choices"]
    labels = [choice["label"] for choice in choices]
    options = tuple((doc["question"]["stem"], " " + choice["text"]) for choice in choices)
    return Choices(options, labels.index(doc["answerKey"].strip()))


TASKS = (
    Task(
        name="openbookqa",
        about="elementary science, without the book",
        protocol="likeliest answer, sum (acc) and by characters (acc_norm); as lm-eval's task of this name",
        source="Mihaylov et al. 2018; Data/Main of the authors' OpenBookQA-V1-Sep2018.zip",
        files=("openbookqa/Main/test.jsonl",),
        example=(
            '{"question": {"stem": "A rock that was molten is", "choices": [{"text": "granite", "label": "A"}, '
            '{"text": "chalk", "label": "B"}]}, "answerKey": "A"}',
        ),
        training=("openbookqa/Main/train.jsonl",),
        read=lambda paths: json_lines(paths, "question", "answerKey"),
        ask=choose(question),
        figures={"acc": mean("acc"), "acc_norm": mean("acc_norm")},
    ),
)
