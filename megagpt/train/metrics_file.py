"""metrics.jsonl, the record of a run: one JSON object a line, strict JSON (NaN and Inf are null).

A training row has "step", "tokens", "loss", "lr", "grad_norm", "step_time_s" and, after the first step of a
process, the rates; with log.noise_scale "noise_scale_tokens". A validation row has "step", "tokens",
"validation_loss", "perplexity", "bits_per_byte". A row of samples has "step" and "samples", each with "prompt" and
"text". "step" counts the steps done, from 1; "time" is when the row was written, in seconds since 1970.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megagpt.errors import UserError
from megagpt.files import json_text, open_own, os_reason, replace_text, require_regular
from megagpt.train.appended import AppendedFile

NAME = "metrics.jsonl"
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl. The last line may be cut short, as a killed run leaves it; it is left out.

    Raises UserError, naming the line, for anything else that is not such a file.
    """
    try:
        rows, damaged = _read(path)
    except OSError as error:
        raise UserError(f"{path}: {os_reason(error)}; give the folder of a run, or its {NAME}") from None
    if damaged:
        number, line = damaged[0]
        raise UserError(
            f"{path}, line {number}: got {line[:40].decode(errors='replace')!r}, wanted a JSON object with an integer "
            '"step"; delete this line to use the rest'
        )
    return rows


def _read(path: Path) -> tuple[list[Row], list[tuple[int, bytes]]]:
    """The rows, and the lines that are none, with their numbers from 1.  Raises OSError."""
    require_regular(path)
    rows, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
        else:
            damaged.append((number, line))
    return rows, damaged


def open_from(path: Path, start_step: int, say: Callable[[str], None] = lambda line: None) -> AppendedFile:
    """Open to append what follows start_step done steps; what stands there of later ones is dropped.

    A log is no reason to stop: what is no row of one is set aside in PATH.damaged, and say is told.
    Raises UserError where that cannot be written.
    """
    try:
        if path.exists():
            rows, damaged = _read(path)
            if damaged:
                aside = path.with_name(f"{path.name}.damaged")
                with open_own(aside, "ab") as file:
                    file.write(b"".join(line + b"\n" for _, line in damaged))
                say(f"note: {path}: {len(damaged)} damaged lines, the first line {damaged[0][0]}, are now in {aside}")
            replace_text(path, "".join(to_line(row) for row in rows if row["step"] <= start_step))
        return AppendedFile(path)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({os_reason(error)}); remove it, make room, or give another --save"
        ) from None


def to_line(row: Row) -> str:
    """One row as it stands in the file. Floats are read back bit for bit."""
    return json_text(row) + "\n"
