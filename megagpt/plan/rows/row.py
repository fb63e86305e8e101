"""A measured run of any of the tables: the job, as far as table and source say it, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.plan.job import Job


@dataclass(frozen=True)
class Row:
    """source: whose figures.  sweep: runs of one model and engine that are compared with each other, for ranks.

    step_s: seconds of a step.  memory_gib: of a rank, where measured.  failed: it did not run; None where tables of its
    kind keep no failures.  sick: the source or its numbers say that the machine was not well; see `rows/tables.py`.
    """

    source: str
    sweep: str
    name: str
    job: Job
    step_s: float | None = None
    memory_gib: float | None = None
    failed: bool | None = None
    sick: bool = False


@dataclass(frozen=True)
class Skipped:
    """A row that cannot be predicted, and why."""

    source: str
    why: str
