"""What is written down of faults.

RUN/faults/step-000057.json: what went wrong in a step, and the text that it was trained on, to be looked at.
RUN/skipped_steps.json: the steps that a rewind leaves out, written down before anything follows from it: so a run that
is killed and goes on, and a replay from the start with --faults.skip-steps, do bitwise the same.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagpt.data.indexed.blend import Samples
from megagpt.data.loader import Rows
from megagpt.data.tokenizers.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.files import os_reason, replace_text

REWINDS = "skipped_steps.json"
MOST_TEXTS = 16  # samples whose text is shown; documents are told of all
MOST_CHARACTERS = 2000  # of a sample
MOST_TOKENS = 200  # of a sample, where there is no tokenizer to read them


@dataclass(frozen=True)
class FaultNotes:
    """Writes notes about the faults of one run. writes: this is the rank that does it (the others do nothing)."""

    run: Path
    samples: Samples | Rows
    tokenizer: Tokenizer | None
    writes: bool

    def write(self, step: int, what: dict[str, Any], positions: Sequence[int]) -> str:
        """Write down a fault of step `step` (counted from 1) and the samples at these positions of the run.

        Returns where it stands, or why it does not: a note that cannot be written is no reason to stop.
        """
        path = self.run / "faults" / f"step-{step:06d}.json"
        if not self.writes:
            return str(path)
        note = {"step": step, **what, "samples": [self._sample(n, p) for n, p in enumerate(positions)]}
        try:
            path.parent.mkdir(exist_ok=True)
            replace_text(path, json.dumps(_strict(note), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            return f"not in {path}, which cannot be written ({os_reason(error)})"
        return str(path)

    def _sample(self, number: int, position: int) -> dict[str, Any]:
        names = ("dataset", "document", "first_token", "n_tokens")
        pieces = [dict(zip(names, piece, strict=True)) for piece in self.samples.sources_of(position)]
        told: dict[str, Any] = {"position": position, "documents": pieces}
        if number < MOST_TEXTS:
            tokens = self.samples[position]
            if self.tokenizer is None:
                told["tokens"] = tokens[:MOST_TOKENS].tolist()
            else:
                told["text"] = self.tokenizer.decode(tokens.tolist())[:MOST_CHARACTERS]
        return told


def _strict(value: Any) -> Any:
    """JSON has no NaN: as words."""
    if isinstance(value, dict):
        return {key: _strict(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_strict(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


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
    path = run / REWINDS
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
        replace_text(run / REWINDS, json.dumps([asdict(r) for r in rewinds], indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write {run / REWINDS} ({os_reason(error)}); make room, then go on with --load"
        ) from error
