"""What a fine-tuning leaves beside its checkpoints: result.json, and predictions of its best step. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megagpt.errors import UserError
from megagpt.files import os_reason, replace_text

RESULT = "result.json"


def is_best(run: Path, step: int, score: float) -> bool:
    """Whether no earlier step of the run scored as well. One that is done again, after a crash, counts anew."""
    before = read_result(run)
    return before is None or before["step"] >= step or before["score"] < score


def write_result(run: Path, step: int, score: float, figures: Mapping[str, float], about: Mapping[str, Any]) -> None:
    """The best step so far: what it scored, and what was trained.  Raises UserError where it cannot be written."""
    whole = {"step": step, "score": score, **about, "figures": dict(figures)}
    _write(run / RESULT, json.dumps(whole, indent=1, allow_nan=False) + "\n")


def write_predictions(run: Path, name: str, predictions: Sequence[str]) -> None:
    """One answer a line, as GLUE wants them handed in.  Raises UserError where they cannot be written."""
    lines = ["index\tprediction", *(f"{i}\t{answer}" for i, answer in enumerate(predictions))]
    _write(run / "predictions" / f"{name}.tsv", "\n".join(lines) + "\n")


def read_result(run: Path) -> dict[str, Any] | None:
    """What `write_result` wrote; None where there is none.  Raises UserError where it is none of ours."""
    path = run / RESULT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not (isinstance(found["step"], int) and isinstance(found["score"], float | int)):
            raise ValueError("step or score is no number")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: is no result of a run ({error})", remedy="delete it") from None


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        replace_text(path, text)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({os_reason(error)})", remedy="make room, or give another --save"
        ) from None
