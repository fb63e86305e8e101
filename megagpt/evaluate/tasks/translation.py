"""WMT-14, English and French (Bojar et al. 2014), asked as Radford et al. 2019, section 3.7."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megagpt.errors import UserError
from megagpt.evaluate.task import Doc, Task, text_of
from megagpt.evaluate.writing import bleu, greedy, write


def read(paths: Sequence[Path]) -> list[Doc]:
    """A sentence and its translation, by line."""
    ours, theirs = (text_of(path).removesuffix("\n").split("\n") for path in paths)
    if len(ours) != len(theirs):
        raise UserError(f"{paths[0]} has {len(ours)} lines, {paths[1]} {len(theirs)}", "wanted as many", "get both")
    return [{"source": a, "gold": b} for a, b in zip(ours, theirs, strict=True)]


EXAMPLE = {"en": "The road is closed.\n", "fr": "La route est fermée.\n"}


def _task(source: str, target: str) -> Task:
    return Task(
        name=f"wmt14_{source}_{target}",
        about=f"translation, {source} to {target}",
        protocol="after pairs 'sentence = sentence', greedy, the first line; BLEU by sacrebleu, 13a; GPT-2 paper",
        source=f"Bojar et al. 2014; newstest2014 by sacrebleu -t wmt14/full -l {source}-{target} --echo src (or ref)",
        files=(f"wmt14/newstest2014.{source}", f"wmt14/newstest2014.{target}"),
        example=(EXAMPLE[source], EXAMPLE[target]),
        read=read,
        ask=write(
            lambda doc: (f"{doc['source']} =", " " + doc["gold"]),
            lambda doc, text: {"translation": text.strip(), "gold": doc["gold"]},
            greedy(100, "\n"),
            between="\n",
        ),
        figures={"bleu": bleu("translation", "gold")},
        shots=5,
    )


TASKS = (_task("en", "fr"), _task("fr", "en"))
