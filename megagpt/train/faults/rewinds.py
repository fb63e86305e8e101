"""RUN/skipped_steps.json: the steps that a rewind leaves out, written down before anything follows from it.

With it a run that is killed and goes on, and a replay from the start with --faults.skip-steps, do bitwise the same.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megagpt.errors import UserError
from megagpt.files import replace_text

NAME = "skipped_steps.json"


@dataclass(frozen=True)
class Rewind:
    """A spike that a run went back for. step: the one that is left out from then on, counted from 1."""

    step: int
    back_to: int
    what: str
    value: float
    zscore: float


def read_rewinds(run: Path) -> list[Rewind]:
    """The rewinds of a run, oldest first.  Raises UserError where the file is none of ours."""
    path = run / NAME
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        rewinds = [Rewind(**entry) for entry in entries]
        if not isinstance(entries, list) or not all(type(r.step) is int and r.step >= 1 for r in rewinds):
            raise ValueError("not a list, or a step is no whole number")
        return rewinds
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path}: not a list of rewinds ({error}); delete it, and name the steps to leave out: --faults.skip-steps"
        ) from None


def add_rewind(run: Path, rewind: Rewind) -> None:
    """Write down one more, for good.  Raises UserError where that cannot be done."""
    rewinds = [*read_rewinds(run), rewind]
    try:
        replace_text(run / NAME, json.dumps([asdict(r) for r in rewinds], indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {run / NAME} ({error.strerror}); make room, then go on with --load") from error
