"""Tasks put to a model: which files, which examples before a question, what came out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import UserError, nearest
from megagpt.evaluate.answers import Answers
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


def tasks_named(names: Sequence[str]) -> list[Task]:
    """Raises UserError for a name that none has."""
    for name in names:
        if name not in ALL:
            near = nearest(name, ALL)
            hint = f"did you mean {near}?" if near else "--list shows all"
            raise UserError(f"got the task {name}", f"wanted some of the {len(ALL)} tasks", hint)
    return [ALL[name] for name in names]


def files_of(task: Task, data: Path) -> list[Path]:
    """The task's files, its training files last.  Raises UserError that names what is missing, and its source."""
    paths = [data / name for name in (*task.files, *task.training)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"{task.name} needs {', '.join(missing)}", "which is not there", f"get it: {task.source}")
    return paths


def run_task(task: Task, answers: Answers, data: Path, *, shots: int | None = None, limit: int | None = None) -> Result:
    """Put a task to a model.

    shots: examples before each question; None: as many as the task has.  limit: the first documents only.
    Comm: those of `Answers`.  Raises UserError for files that are missing or damaged.
    """
    docs, pool = together(lambda: _read(task, data))
    n_shots = task.shots if shots is None else shots
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


def _read(task: Task, data: Path) -> tuple[list[Doc], list[Doc]]:
    """Documents, and those that examples are taken from."""
    paths = files_of(task, data)
    docs = task.read(paths[: len(task.files)])
    if not docs:
        raise UserError(f"{task.name}: {paths[0]} has no documents", "wanted one or more", "get the file anew")
    return docs, task.read(paths[len(task.files) :]) if task.training else docs


def _shots(pool: Sequence[Doc], itself: int | None, number: int, n: int, task: Task) -> list[Doc]:
    if n == 0:
        return []
    others = [i for i in range(len(pool)) if i != itself]
    if n > len(others):
        raise UserError(f"got --few-shot {n}", f"{task.name} has {len(others)} examples", "take fewer")
    return [pool[i] for i in random.Random(SEED + number).sample(others, n)]
