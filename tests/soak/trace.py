"""What a run leaves, bit for bit, and where two runs differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megagpt.checkpoint import folders
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.state import read_state
from megagpt.train import metrics_file

EXACT = ("loss", "grad_norm", "lr", "tokens", "validation_loss", "bits_per_byte")  # and no times


@dataclass(frozen=True)
class Trace:
    """losses: by step and name of the figure, as hexadecimal floats. checkpoints: by step, what is in each: a hash of
    every logical tensor, and the counters. leftovers: what else lies in checkpoints/.
    """

    losses: dict[str, str]
    checkpoints: dict[str, dict[str, str]]
    leftovers: list[str]


def trace_of(run: Path) -> Trace:
    """Read all of it from the folder of a run."""
    found = folders.checkpoints_of(run)
    others = {p.name for p in (run / "checkpoints").iterdir()} - {p.name for p in found} - {folders.LATEST}
    return Trace(losses_of(run), {p.name: contents_of(p) for p in found}, sorted(others))


def losses_of(run: Path) -> dict[str, str]:
    """ "step 3 loss": a hexadecimal float, of every figure in metrics.jsonl that is no time."""
    path = run / metrics_file.NAME
    rows = metrics_file.read_rows(path) if path.exists() else []
    return {f"step {row['step']} {name}": float(row[name]).hex() for row in rows for name in EXACT if name in row}


def contents_of(folder: Path) -> dict[str, str]:
    """A hash of each weight and moment, and what the state says that is not about settings."""
    state = read_state(folder)
    contents = {f"counter {name}": float(value).hex() for name, value in state.counters.items()}
    contents |= {name: str(getattr(state, name)) for name in ("step", "samples", "tokens", "skipped_steps", "data")}
    contents |= {"lr": state.lr.hex(), "validation_loss": (state.validation_loss or 0.0).hex()}
    with Reader(folder) as reader:
        for key in reader.index:
            for name in reader.index[key]:
                values = reader.read(key, name)
                contents[f"{key} of {name} {values.shape}"] = hashlib.sha256(values.tobytes()).hexdigest()
    return contents


def differences(expected: Trace, got: Trace) -> list[str]:
    """One line for each thing that is not the same; empty where nothing is."""
    found = differing("metrics.jsonl", expected.losses, got.losses)
    found += differing("checkpoints", dict.fromkeys(expected.checkpoints, ""), dict.fromkeys(got.checkpoints, ""))
    for name in expected.checkpoints.keys() & got.checkpoints.keys():
        found += differing(name, expected.checkpoints[name], got.checkpoints[name])
    return found + [f"left behind: {name}" for name in got.leftovers]


def differing(where: str, expected: Mapping[str, Any], got: Mapping[str, Any]) -> list[str]:
    """What two tables do not have in common."""
    return [
        f"{where}: {key}: expected {expected.get(key, 'nothing')}, got {got.get(key, 'nothing')}"
        for key in [*expected, *(key for key in got if key not in expected)]
        if expected.get(key) != got.get(key)
    ]


def reads_of(notes: Path, n_ranks: int) -> list[list[str]]:
    """For each rank, the samples that it read in one attempt, in order: "position sha256"."""
    found = []
    for rank in range(n_ranks):
        path = notes.with_name(f"{notes.name}-rank-{rank}.reads")
        text = path.read_text(encoding="ascii") if path.exists() else ""
        found.append(text.split("\n")[:-1])  # a killed process may leave half a line
    return found


def read_differences(expected: list[list[str]], got: list[list[str]], *, skipped: float, all_of_it: bool) -> list[str]:
    """Whether each rank read what the uninterrupted run read after its first `skipped` (a share of all samples).

    all_of_it: to the end; else an attempt that was killed may have read any number of them.
    """
    found = []
    for rank, (all_expected, ours) in enumerate(zip(expected, got, strict=True)):
        wanted = all_expected[round(skipped * len(all_expected)) :]
        if not all_of_it:
            wanted = wanted[: len(ours)]
        if ours != wanted:
            same = [a == b for a, b in zip(ours, wanted, strict=False)]
            i = same.index(False) if False in same else len(same)
            found.append(
                f"rank {rank}: read {len(ours)} samples, expected {len(wanted)}; number {i} is {ours[i : i + 1]}, "
                f"expected {wanted[i : i + 1]}"
            )
    return found
