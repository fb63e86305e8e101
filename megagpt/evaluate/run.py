"""Tasks put to a model: which files, which examples before a question, what came out."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megagpt.errors import UserError, nearest
from megagpt.evaluate.answers import Answers
from megagpt.evaluate.language import Windowed, dataset_task, strided, text_task
from megagpt.evaluate.split import SPLITS
from megagpt.evaluate.task import Doc, Record, Task, standard_error
from megagpt.evaluate.tasks import ALL
from megagpt.processes.agree import together

SEED = 1234  # of the examples before a question: with the question's number, so that they are its own


@dataclass(frozen=True)
class Result:
    """What a task found.

    n: documents.  figures, errors: by name, the figure and, of a mean, its standard error.
    n_cut: prompts that lost their beginning, since the context does not hold them.
    """

    task: Task
    n: int
    shots: int
    figures: dict[str, float]
    errors: dict[str, float | None]
    n_cut: int
    records: list[Record]


def tasks_named(names: Sequence[str], stride: int | None = None) -> list[Task]:
    """By name; text:FILE and dataset:PREFIX[:SPLIT] are made here.  stride: of the windows of texts as a whole.

    Raises UserError for a name that none has.
    """
    return [strided(task_named(name), stride) for name in names]


def task_named(name: str) -> Task:
    """See `tasks_named`."""
    kind, colon, rest = name.partition(":")
    if kind == "text" and colon:
        return text_task(rest)
    if kind == "dataset" and colon:
        prefix, _, split = rest.rpartition(":")
        return dataset_task(prefix, split) if split in SPLITS else dataset_task(rest)
    if name not in ALL:
        near = nearest(name, ALL)
        hint = f"did you mean {near}?" if near else "--list shows all"
        wanted = f"wanted some of the {len(ALL)} tasks, text:FILE or dataset:PREFIX"
        raise UserError(f"got the task {name}", wanted, hint)
    return ALL[name]


def shots_of(task: Task, shots: int | None) -> int:
    """How many examples stand before each question; None: as many as the task has. Texts as a whole have none."""
    if isinstance(task.ask, Windowed):
        return 0
    return task.shots if shots is None else shots


def files_of(task: Task, data: Path, shots: int | None = None) -> list[Path]:
    """The task's files, where examples are shown its training files last.

    Of a task of parts: those of the parts whose files are there.
    Raises UserError that names what is missing, and its source.
    """
    if task.parts:
        return [path for part in parts_there(task, data) for path in files_of(part, data, shots)]
    training = task.training if shots_of(task, shots) else ()
    paths = [data / name for name in (*task.files, *training)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{task.name} needs {', '.join(missing)}", "which is not there", f"get it: {task.source}")
    return paths


def parts_there(task: Task, data: Path) -> list[Task]:
    """The parts whose files are there.  Raises UserError where none is."""
    there = [part for part in task.parts if all((data / name).is_file() for name in part.files)]
    if not there:
        names = ", ".join(sorted({name for part in task.parts for name in part.files}))
        raise UserError(f"{task.name} needs some of {names} in {data}", "none is there", f"get them: {task.source}")
    return there


def run_task(task: Task, answers: Answers, data: Path, *, shots: int | None = None, limit: int | None = None) -> Result:
    """Put a task to a model.

    shots: examples before each question; None: as many as the task has.  limit: the first documents only.
    Comm: those of `Answers`.  Raises UserError for files that are missing or damaged.
    """
    if task.parts:
        return _run_parts(task, answers, data, shots, limit)
    n_shots = shots_of(task, shots)
    docs, pool = together(lambda: _read(task, data, n_shots))
    n_docs = len(docs) if limit is None else min(limit, len(docs))
    own = not task.training
    chosen = together(lambda: [_shots(pool, i if own else None, i, n_shots, task) for i in range(n_docs)])
    n_cut = answers.n_cut
    records = task.ask(answers, docs[:n_docs], chosen)
    return Result(
        task,
        len(records),
        n_shots,
        {name: figure(records) for name, figure in task.figures.items()},
        {name: standard_error(records, name) for name in task.figures},
        answers.n_cut - n_cut,
        records,
    )


def _run_parts(task: Task, answers: Answers, data: Path, shots: int | None, limit: int | None) -> Result:
    """The mean over the parts that are there; the protocol says which are not."""
    there = together(lambda: parts_there(task, data))
    missing = [part.name for part in task.parts if part not in there]
    protocol = f"{task.protocol}; without {', '.join(missing)}, whose files are missing" if missing else task.protocol
    results = [run_task(part, answers, data, shots=shots, limit=limit) for part in there]
    own = {result.task.name: next(iter(result.figures.values())) for result in results}
    return Result(
        replace(task, protocol=protocol),
        sum(result.n for result in results),
        0,
        {task.name: math.fsum(own.values()) / len(own), **own},
        dict.fromkeys((task.name, *own)),
        sum(result.n_cut for result in results),
        [{"task": result.task.name, **record} for result in results for record in result.records],
    )


def _read(task: Task, data: Path, shots: int) -> tuple[list[Doc], list[Doc]]:
    """Documents, and those that examples are taken from."""
    paths = files_of(task, data, shots)
    docs = task.read(paths[: len(task.files)])
    if not docs:
        raise UserError(f"{task.name}: {paths[0]} has no documents", "wanted one or more", "get the file anew")
    training = paths[len(task.files) :]
    return docs, task.read(training) if training else docs


def _shots(pool: Sequence[Doc], itself: int | None, number: int, n: int, task: Task) -> list[Doc]:
    if n == 0:
        return []
    others = [i for i in range(len(pool)) if i != itself]
    if n > len(others):
        raise UserError(f"got --few-shot {n}", f"{task.name} has {len(others)} examples", "take fewer")
    return [pool[i] for i in random.Random(SEED + number).sample(others, n)]
