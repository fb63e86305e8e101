"""The benchmark of `make gpu-check`: benchmarks/kernels.py for one op, held to the project's goals."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from benchmarks.kernels import OURS, PASSES, Clock, Measured, measure_op
from megagpt.ops.library import MISSING_KERNELS

WANTED_SHARE = {"forward": 0.85, "backward": 0.75}  # of copy bandwidth
WANTED_CROSS_ENTROPY = 1.5  # times what reading the logits once and writing them once takes


def bench(op: str, device: str, quick: bool) -> dict[str, Any]:
    """Figures of one op, and which goals they meet. bf16 alone, as training runs."""
    if MISSING_KERNELS:
        raise RuntimeError(f"no compiled kernels: {MISSING_KERNELS}")
    spec = importlib.import_module(f"tests.ops.cases.{op}").SPEC
    measured = measure_op(spec, Clock(device), ("bf16",), seconds=0.1 if quick else 0.5, first=quick)
    return {**measured.as_json(), "goals": list(goals(measured))}


def goals(measured: Measured) -> Iterator[dict[str, Any]]:
    """Each goal for each shape: what was got, what was wanted, and whether that is met."""
    copy = sum(measured.copy_gb_per_s.values()) / 2 * 1e9
    for row in measured.rows:
        ours = {which: row[which]["implementations"].get(OURS) for which in PASSES}
        if measured.op.startswith("cross_entropy") and all(ours.values()):
            got = sum(ours[which]["median_s"] for which in PASSES) / (2 * row["input_bytes"] / copy)
            yield _goal(
                row, "both passes, times the byte bound", got, WANTED_CROSS_ENTROPY, got <= WANTED_CROSS_ENTROPY
            )
        for which in PASSES:
            if ours[which] is None:
                continue
            share, wanted = ours[which]["share_of_copy"], WANTED_SHARE[which]
            if not measured.op.startswith("cross_entropy"):
                yield _goal(row, f"{which}, share of copy bandwidth", share, wanted, share >= wanted)
            compiled = row[which]["implementations"].get("compile")
            if compiled:
                ratio = compiled["time_over_ours"]
                yield _goal(row, f"{which}, torch.compile's time over ours", ratio, 1.0, ratio >= 1.0)


def _goal(row: dict[str, Any], goal: str, got: float, wanted: float, met: bool) -> dict[str, Any]:
    return {"shape": row["shape"], "goal": goal, "got": round(got, 3), "wanted": wanted, "met": met}
