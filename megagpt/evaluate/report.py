"""What an evaluation found: a table with protocol and published figures, JSON, records, a curve over steps or sizes."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture
from matplotlib.ticker import EngFormatter
from rich.console import Group, RenderableType
from rich.table import Table

from megagpt.errors import UserError
from megagpt.evaluate.run import Result
from megagpt.files import json_text, open_own


@dataclass(frozen=True)
class Subject:
    """A model that was evaluated.  name: as short as tells it from the others."""

    name: str
    load: str
    folder: Path
    step: int
    n_parameters: int
    precision: str
    layout: dict[str, int]
    tokenizer_sha256: str


@dataclass(frozen=True)
class Published:
    """A figure of a paper or of others' measurement; `protocol` says how far it compares."""

    task: str
    figure: str
    model: str
    value: str
    protocol: str
    source: str


def published() -> list[Published]:
    """Those of published.csv."""
    text = (resources.files("megagpt") / "evaluate" / "published.csv").read_text()
    return [Published(**row) for row in csv.DictReader(io.StringIO(text))]


def table(subjects: Sequence[Subject], results: Sequence[Sequence[Result]]) -> RenderableType:
    """A row a figure, a column a model; below it, of each task, how it was asked and what others found.

    results: of each model, a list by task.
    """
    grid = Table(box=None, pad_edge=False)
    grid.add_column("task", overflow="fold")
    grid.add_column("figure")
    grid.add_column("n", justify="right")
    for subject in subjects:
        grid.add_column(subject.name, justify="right", overflow="fold")
    for of_models in zip(*results, strict=True):
        first = of_models[0]
        for name in first.figures:
            cells = [shown(result.figures[name], result.errors[name]) for result in of_models]
            head = (first.task.name, f"{first.n:,}") if name == next(iter(first.figures)) else ("", "")
            grid.add_row(head[0], name, head[1], *cells)
    return Group(grid, "", *(_note(result) for result in results[0]))


def shown(value: float, error: float | None = None) -> str:
    """0.3256 ±0.0065, 35.13, 1.2e+06."""
    text = f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}" if abs(value) < 1e5 else f"{value:.2e}"
    return text if error is None else f"{text} ±{error:.4f}"


def _note(result: Result) -> str:
    task = result.task
    shots = f"; {result.shots} examples before each" if result.shots else ""
    cut = f"; {result.n_cut:,} prompts lost their beginning: the context does not hold them" if result.n_cut else ""
    lines = [f"{task.name}: {task.about}; {task.protocol}{shots}{cut}. {task.source}."]
    others: dict[tuple[str, str], list[str]] = {}
    for row in published():
        if row.task == task.name:
            others.setdefault((row.figure, f"{row.protocol}; {row.source}"), []).append(f"{row.model} {row.value}")
    lines += [f"  published {figure}: {', '.join(some)} ({how})" for (figure, how), some in others.items()]
    return "\n".join(lines)


def as_json(subjects: Sequence[Subject], results: Sequence[Sequence[Result]]) -> list[dict[str, Any]]:
    """An object a model and task."""
    rows = {(row.task, row.figure): [] for row in published()}
    for row in published():
        rows[row.task, row.figure].append(vars(row))
    return [
        {
            **{key: str(value) if isinstance(value, Path) else value for key, value in vars(subject).items()},
            "task": result.task.name,
            "protocol": result.task.protocol,
            "source": result.task.source,
            "n": result.n,
            "shots": result.shots,
            "n_cut": result.n_cut,
            "figures": result.figures,
            "standard_errors": result.errors,
            "published": [row for name in result.figures for row in rows.get((result.task.name, name), [])],
        }
        for subject, of_tasks in zip(subjects, results, strict=True)
        for result in of_tasks
    ]


def write_records(folder: Path, subject: Subject, results: Sequence[Result]) -> None:
    """MODEL/TASK.jsonl: a line a document: what was asked, what came back, what it counts."""
    place = folder / subject.name.replace("/", "_")
    place.mkdir(parents=True, exist_ok=True)
    for result in results:
        with open_own(place / f"{result.task.name.replace('/', '_')}.jsonl", "w") as file:
            file.writelines(json_text(_plain(record)) + "\n" for record in result.records)


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in record.items()}


def draw(subjects: Sequence[Subject], results: Sequence[Sequence[Result]], out: Path) -> None:
    """A small plot a task: its figure over the steps of one run, else over the parameters of the models."""
    steps = len({subject.folder.parent for subject in subjects}) == 1 and subjects[0].step > 0
    x = [subject.step if steps else subject.n_parameters for subject in subjects]
    order = sorted(range(len(x)), key=lambda i: x[i])
    tasks = [result.task for result in results[0]]
    n_columns = math.ceil(math.sqrt(len(tasks)))
    n_rows = math.ceil(len(tasks) / n_columns)
    picture = Picture(figsize=(4.2 * n_columns, 3.2 * n_rows), dpi=120, layout="constrained")
    grid = picture.subplots(n_rows, n_columns, squeeze=False).flat
    for axes, i in zip(grid, range(len(tasks)), strict=False):
        name = next(iter(tasks[i].figures))
        y = [results[j][i].figures[name] for j in order]
        error = [results[j][i].errors[name] or 0.0 for j in order]
        axes.errorbar([x[j] for j in order], y, yerr=error, marker="o", markersize=4, linewidth=1.4, capsize=2)
        axes.set_title(tasks[i].name)
        axes.set_ylabel(name)
        axes.set_xlabel("training step" if steps else "parameters")
        axes.set_xscale("linear" if steps else "log")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(True, color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid)[len(tasks) :]:
        axes.set_visible(False)
    data = io.BytesIO()
    try:
        picture.savefig(data, format="png")
        with open_own(out, "wb") as file:
            file.write(data.getbuffer())
    except OSError as error:
        raise UserError(f"cannot write {out}: {error}", "wanted a place for a picture", "change --out") from None
