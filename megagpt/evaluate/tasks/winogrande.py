"""WinoGrande: who or what a blank in a sentence stands for (Sakaguchi et al. 2019)."""

from __future__ import annotations

from megagpt.evaluate.choices import Choices, choose
from megagpt.evaluate.task import Doc, Task, json_lines


def question(doc: Doc) -> Choices:
    """Partial scoring, as lm-eval asks it: which name makes what follows the blank likelier."""
    before, after = doc["sentence"].split("_", 1)
    options = tuple((before + doc[key], " " + after.strip()) for key in ("option1", "option2"))
    return Choices(options, int(doc["answer"]) - 1)


TASKS = (
    Task(
        name="winogrande",
        about="which of two names fills a blank",
        protocol="which makes the rest of the sentence likelier (partial scoring); as lm-eval's task of this name",
        source="Sakaguchi et al. 2019; dev.jsonl of the authors' winogrande_1.1.zip",
        files=("winogrande/dev.jsonl",),
        example=(
            '{"sentence": "The cup is not in the box, since the _ is small.", "option1": "cup", "option2": "box", '
            '"answer": "2"}',
        ),
        training=("winogrande/train_xl.jsonl",),
        read=lambda paths: json_lines(paths, "sentence", "option1", "option2", "answer"),
        ask=choose(question),
    ),
)
