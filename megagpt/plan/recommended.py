"""Layouts that NVIDIA recommends, beside the planner's best of the same model, GPUs, batch and precision. No torch."""

from __future__ import annotations

import csv
from dataclasses import dataclass, replace
from pathlib import Path

from megagpt.errors import UserError
from megagpt.plan.footprint import fits
from megagpt.plan.job import Job, Layout
from megagpt.plan.machine import machine
from megagpt.plan.rows.sources import NEMO
from megagpt.plan.rows.tables import shape
from megagpt.plan.search import Found, search
from megagpt.plan.step import step_time

_NAMES = {("gpt3", "175b"): "gpt3-175b", ("llama31", "405b"): "llama3-405b"}
_FAMILIES = ("llama3", "nemotron3", "nemotron4")


@dataclass(frozen=True)
class Recommended:
    """name: model and precision.  seconds, best: of a step, theirs and the planner's.  fits: whether theirs does."""

    name: str
    layout: Layout
    seconds: float
    fits: bool
    best: Found

    @property
    def slower(self) -> float:
        """Their step over the planner's best, less 1."""
        return self.seconds / self.best.step.seconds - 1


def read_recommended(path: Path) -> list[Recommended]:
    """The dense models that are trained from scratch, of NeMo's scripts/performance/recommended_model_configs."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            records = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    found = [_compared(r) for r in records if r.get("task") == "pre_train"]
    return [r for r in found if r is not None]


def _compared(r: dict[str, str]) -> Recommended | None:
    name = _NAMES.get((r["model"], r["size"]), f"{r['model']}-{r['size']}" if r["model"] in _FAMILIES else "")
    if not name:
        return None
    gpus, seq, tp, pp, cp, virtual, micro, batch = (
        int(float(r[k])) for k in ("num_gpus", "seq_len", "tp_size", "pp_size", "cp_size", "vp_size", "mbs", "gbs")
    )
    model, engine, on = shape(name, seq), replace(NEMO, fp8=r["dtype"] == "fp8"), machine("h100-80g")
    virtual = virtual if pp > 1 else 1
    theirs = Layout(
        gpus=gpus, tp=tp, pp=pp, cp=cp, dp=gpus // (tp * pp * cp), virtual=virtual, micro_batch=micro, zero=1,
        global_batch=batch, sequence_parallel=tp > 1, schedule="interleaved" if virtual > 1 else "1f1b",
    )  # fmt: skip
    job = Job(model, theirs, engine, on)
    best = search(model, gpus, batch, on, engine, _nemo_runs, count=1).best[0]
    return Recommended(f"{name} {r['dtype']}", theirs, step_time(job).seconds, fits(job), best)


def _nemo_runs(layout: Layout) -> bool:
    """NeMo has no zero bubble; these recipes do not use FSDP."""
    return layout.schedule != "zero_bubble" and layout.zero < 3
