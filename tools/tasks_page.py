"""Write docs/tasks.md from the tasks: what each asks, of which files, in which words, and how answers are counted.

python tools/tasks_page.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from megagpt.data.tokenizers.bytes import ByteTokenizer
from megagpt.errors import ArgumentParser, run_cli
from megagpt.evaluate.score import Score
from megagpt.evaluate.task import Record, Task
from megagpt.evaluate.tasks import ALL

PAGE = Path(__file__).parents[1] / "docs" / "tasks.md"

INTRODUCTION = """# Tasks

*Written by `tools/tasks_page.py` from the files of `megagpt/evaluate/tasks`; change it there.*

What `python tools/evaluate.py --tasks NAME` asks, how, of which files below `--data`, and where these are from;
[evaluation.md](evaluation.md) tells how to run tasks, and how to add one. Beneath the table stands what a model is
given of a made-up example: scored parts in brackets (↵: a line's end), the right one marked; or what it goes on from.

| figure | what it counts |
|---|---|
| `acc` | the right answer's log-probability is the highest; of a single answer: each token is the likeliest |
| `acc_norm` | likewise, over its length in characters, without the blank before it |
| `acc_all` | as `acc`, stop words allowed |
| `centred` | what is right beyond guessing, as a share of what guessing leaves: 0 for guessing, 1 for all right |
| `mcc`, `f1` | of classes: Matthews' correlation; F1 of the class 1 |
| `f1`, `em` | of texts: F1 of words, exact match; case, punctuation and articles aside |
| `rouge1`, `rouge2`, `rougeL` | F1 of words, pairs, the longest common sequence; stems (rouge-score) |
| `bleu` | of all texts together, 0 to 100 (sacrebleu, 13a) |
| `ppl` | e to the mean loss of an answer, in nats; of a text as a whole: of a token |
| `word_ppl`, `bits_per_byte` | e to the loss by words, in nats; the loss by UTF-8 bytes, in bits |
"""


class NoAnswerError(Exception):
    """In place of an answer: a model is to write something.  args: the prompt."""


class Asked:
    """Stands for a model, a byte a token, that finds all equally likely."""

    empty = (256,)
    tokenizer = ByteTokenizer()
    trained = SimpleNamespace(bounds=SimpleNamespace(begun=tuple))

    def pair(self, context: str, continuation: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of both."""
        return tuple(context.encode()), tuple(continuation.encode())

    def scores(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """The same for each token."""
        made = [np.full(len(continuation), -np.log(257)) for _, continuation in pairs]
        return [Score(of, of, np.zeros(len(of), dtype=bool)) for of in made]

    def texts(self, prompts: Sequence[Any], sampling: Any) -> list[str]:
        """None."""
        raise NoAnswerError(self.tokenizer.decode(prompts[-1]))


def main() -> None:
    """Write the page."""
    ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")


def page() -> str:
    """The whole page."""
    heads = ("task", "asks", "how", "figures", "shots", "files", "source")
    lines = [list(heads), ["---"] * len(heads), *map(row, ALL.values())]
    parts = [INTRODUCTION, *("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)]
    asked = [(task, shown(task)) for task in ALL.values() if task.example]
    for text in dict.fromkeys(text for _, text in asked):
        alike = ", ".join(task.name for task, other in asked if other == text)
        parts += ["", f"**{alike}**", "", "```text", text, "```"]
    return "\n".join([*parts, ""])


def row(task: Task) -> list[str]:
    """The cells of a task."""
    files = "<br>".join(f"`{name}`" for name in task.files) or "those of its parts"
    figures = ", ".join(f"`{name}`" for name in task.figures)
    return [f"`{task.name}`", task.about, task.protocol, figures, str(task.shots or ""), files, task.source]


def records_of(task: Task) -> list[Record]:
    """What a task makes of its example."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / str(i) for i in range(len(task.example))]
        for path, text in zip(paths, task.example, strict=True):
            path.write_text(text, encoding="utf-8")
        docs = task.read(paths)
    return task.ask(Asked(), docs, [()] * len(docs))  # pyright: ignore[reportArgumentType]


def shown(task: Task) -> str:
    """What is asked of its example, to read."""
    try:
        record = records_of(task)[-1]
    except NoAnswerError as prompt:
        return f"{prompt}…"
    choices = record["choices"] if "choices" in record else [record["continuation"]]
    contexts = record.get("contexts", [""] * len(choices))
    right = record.get("gold", 0)
    answers = []
    for i, (context, choice) in enumerate(zip(contexts, choices, strict=True)):
        scored = choice.replace("\n", "↵")
        answers.append(f"{'→' if i == right else ' '} {context}[{scored}]")
    return "\n".join([*filter(None, [record["prompt"]]), *answers])


if __name__ == "__main__":
    run_cli(main)
