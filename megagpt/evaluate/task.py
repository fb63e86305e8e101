"""A task: documents of a file, what is asked of a model about each, and figures made of what it answers.

A new one is a file of `tasks/` and a line of `tasks/__init__.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.errors import UserError
from megagpt.evaluate.answers import Answers

Doc = Any
"""What `Task.read` makes of a line of the file."""
Record = dict[str, Any]
"""Of one document: what was asked and answered, for the user to read, and numbers that figures are made of."""
Figure = Callable[[Sequence[Record]], float]
"""A figure over the records of all documents."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One row of a table, or several: one for each figure.

    about: what is asked, in a line.  protocol: how, as it stands beside the number.  source: paper, origin of files.
    files: what is read, below --data.  example: what these may hold, made up: docs/tasks.md shows what is asked of it.
    read: (paths of these) -> documents, in the order of the files.
    ask: (answers, documents, shots) -> a record for each; shots: by document, those that stand before it as examples.
    figures: by name; the first is the task's own.  shots: how many where --few-shot does not say.
    training: a file whose documents the shots are taken from; else they are others of the same files.
    parts: tasks that this one, which reads and asks nothing itself, is the mean of, by the first figure of each.
    """

    name: str
    about: str
    protocol: str
    source: str
    files: tuple[str, ...] = ()
    example: tuple[str, ...] = ()
    read: Callable[[Sequence[Path]], list[Doc]] = lambda paths: []
    ask: Callable[[Answers, Sequence[Doc], Sequence[Sequence[Doc]]], list[Record]] = lambda answers, docs, shots: []
    figures: Mapping[str, Figure] = field(default_factory=lambda: {"acc": mean("acc")})
    shots: int = 0
    training: tuple[str, ...] = ()
    parts: tuple[Task, ...] = ()


def mean(key: str) -> Figure:
    """The mean of a number of the records."""
    return lambda records: math.fsum(record[key] for record in records) / len(records)


def perplexity(key: str = "logprob", per: str | None = None) -> Figure:
    """exp of minus the mean log-probability: of a record, or of what the number `per` counts, over all of them."""

    def found(records: Sequence[Record]) -> float:
        n = math.fsum(record[per] for record in records) if per else len(records)
        loss = -math.fsum(record[key] for record in records) / n
        return math.exp(loss) if loss < 709 else math.inf

    return found


def text_of_record(record: Record) -> str:
    """What the model was asked, with the right answer where the record has it; a text as a whole as it is."""
    if "text" in record:
        return record["text"]
    if "choices" not in record:
        return record["prompt"] + record.get("continuation", "")
    own = record["contexts"][record["gold"]] if "contexts" in record else ""
    return record["prompt"] + own + record["choices"][record["gold"]]


def standard_error(records: Sequence[Record], key: str) -> float | None:
    """Of a mean over records; None where it is none, or of one record."""
    values = [record[key] for record in records if key in record]
    if len(values) != len(records) or len(values) < 2:
        return None
    middle = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def json_lines(paths: Sequence[Path], *keys: str) -> list[Doc]:
    """The objects of JSON-lines files, in order.  Raises UserError for a line that is none, or lacks one of keys."""
    found = []
    for path in paths:
        for i, line in enumerate(text_of(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                doc = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{i}: {error}", "wanted a JSON object a line", "get the file anew") from None
            lacks = [key for key in keys if not isinstance(doc, dict) or key not in doc]
            if lacks:
                raise UserError(f"{path}:{i} has no {lacks[0]!r}", f"wanted {', '.join(keys)}", "get the file anew")
            found.append(doc)
    return found


def text_of(path: Path) -> str:
    """A file as text, line ends as they are.  Raises UserError where it cannot be read as UTF-8."""
    try:
        return path.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}", "wanted a file in UTF-8", "get it anew") from None
