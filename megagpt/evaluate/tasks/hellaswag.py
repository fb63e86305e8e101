"""HellaSwag: how a description of everyday events goes on (Zellers et al. 2019)."""

from __future__ import annotations

import re

from megagpt.evaluate.choices import Choices, choose
from megagpt.evaluate.task import Doc, Task, json_lines, mean


def cleaned(text: str) -> str:
    """Without the marks that WikiHow's articles left: a title becomes the end of a sentence, others go."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def question(doc: Doc) -> Choices:
    """As lm-eval asks it."""
    context = cleaned(f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}")
    return Choices(tuple((context, " " + cleaned(ending)) for ending in doc["endings"]), int(doc["label"]))


TASKS = (
    Task(
        name="hellaswag",
        about="which of four endings goes on with a description",
        protocol="likeliest ending, sum (acc) and by characters (acc_norm); as lm-eval's task of this name",
        source="Zellers et al. 2019; hellaswag_val.jsonl of the authors",
        files=("hellaswag/hellaswag_val.jsonl",),
        example=(
            '{"activity_label": "Roofs", "ctx_a": "[header] How to mend it [title] Bring a ladder.", "ctx_b": "you", '
            '"endings": ["climb it.", "eat it.", "sing [substeps] to it.", "sell it."], "label": 0}',
        ),
        training=("hellaswag/hellaswag_train.jsonl",),
        read=lambda paths: json_lines(paths, "activity_label", "ctx_a", "ctx_b", "endings", "label"),
        ask=choose(question),
        figures={"acc": mean("acc"), "acc_norm": mean("acc_norm")},
    ),
)
