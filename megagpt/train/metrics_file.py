"""metrics.jsonl, the record of a run: one JSON object a line, strict JSON (NaN and Inf are null).

A training row has "step", "tokens", "loss", "lr", "grad_norm", "step_time_s" and, after the first step of a
process, the rates; with log.noise_scale "noise_scale_tokens". A validation row has "step", "tokens",
"validation_loss", "perplexity", "bits_per_byte". "step" counts the steps done, from 1; "time" is when the row was
written, in seconds since 1970.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from megagpt.errors import UserError
from megagpt.train.appended import AppendedFile

NAME = "metrics.jsonl"
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl. The last line may be cut short, as a killed run leaves it; it is left out.

    Raises UserError, naming the line, for anything else that is not such a file.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; give the folder of a run, or its metrics.jsonl") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: byte {error.start} is not UTF-8, so this is no {NAME}; give the folder of a run"
        ) from None
    rows = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(
                f'{path}, line {number}: got {line[:40]!r}, wanted a JSON object with an integer "step"; '
                f"delete this line to use the rest"
            )
        rows.append(row)
    return rows


def open_from(path: Path, start_step: int) -> AppendedFile:
    """Open to append what follows start_step done steps; what stands there of later ones is dropped.

    Raises OSError where the disk does not take it.
    """
    if path.exists():
        kept = [row for row in read_rows(path) if row["step"] <= start_step]
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(map(to_line, kept)), encoding="utf-8")
        os.replace(partial, path)
    return AppendedFile(path)


def to_line(row: Row) -> str:
    """One row as it stands in the file. Floats are read back bit for bit."""
    strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(strict, allow_nan=False) + "\n"
