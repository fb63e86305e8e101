"""A training step under guard: left out where it is to be, explained where it went wrong, judged where it went well.

Everything is decided by numbers that all ranks have anyway, so that a good step costs no message more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megagpt.checkpoint.folders import step_of
from megagpt.checkpoint.state import GuardState, HistoryState, State
from megagpt.data.loader import MicroBatch
from megagpt.processes.agree import RankError, together
from megagpt.train.faults import spikes
from megagpt.train.faults.blame import Sighting, retry_under_watch, weight_not_finite
from megagpt.train.faults.notes import FaultNotes, Rewind, add_rewind, read_rewinds
from megagpt.train.faults.spikes import History, Spike

if TYPE_CHECKING:
    from megagpt.train.step.engine import Engine, StepResult

Batches = Callable[[int], Iterator[MicroBatch]]
"""This rank's micro-batches of a step, counted from 0, as often as they are asked for."""


class Guard:
    """Takes the steps of one run."""

    def __init__(self, engine: Engine, notes: FaultNotes, say: Callable[[str], None], batches: Batches) -> None:
        """say: shows a line, on rank 0.

        Comm: one all-gather and a broadcast of short objects. Raises a RankError where the list of rewinds is damaged.
        """
        self._engine, self._notes, self._say, self._batches = engine, notes, say, batches
        self._config, self._faults = engine.config, engine.config.faults
        self._history, self._n_bad = History(), 0
        self._rewinds = _rewinds_of(notes.run)
        self._left_out = set(self._faults.skip_steps) | {r.step for r in self._rewinds}

    def go_on_from(self, state: State, folder: Path) -> None:
        """Take over what a checkpoint, and the run that it is of, knows of the steps before.

        Comm: one all-gather and a broadcast of short objects. Raises a RankError where its list of rewinds is damaged.
        """
        self._history = History.from_json(state.guard.get("history", HistoryState()))
        self._n_bad = state.guard.get("n_bad", 0)
        rewinds = _rewinds_of(folder.parent.parent)
        self._left_out |= {*state.skipped_steps, *(r.step for r in rewinds)}

    @property
    def left_out(self) -> list[int]:
        """The steps whose batch is not trained on, counted from 1: what `State.skipped_steps` keeps."""
        return sorted(self._left_out)

    @property
    def state(self) -> GuardState:
        """What `State.guard` keeps, so that a run that goes on judges as if it had not ended."""
        return GuardState(history=self._history.to_json(), n_bad=self._n_bad)

    def train_step(self, step: int) -> StepResult:
        """Step `step`, counted from 0; the one that counts, where a machine erred and it was done again.

        Comm: as the engine's; and where something is not finite, that of explaining it.
        Raises a RankError on all ranks where going on is no use: faults.max_bad_steps in a row, or a weight is gone.
        """
        if step + 1 in self._left_out:
            return self._engine.skip_step(step)
        result = self._engine.train_step(step, self._batches(step))
        if not result.skipped:
            self._n_bad = 0
            return result
        result = replace(result, loss=_worst(result.loss))
        if self._config.train.precision == "fp16" and math.isfinite(result.loss):
            return result  # gradients overflow now and then, which lowers the loss scale
        return self._explain(step, result)

    def judge(self, step: int, result: StepResult, last_checkpoint: Callable[[], Path | None]) -> Path | None:
        """The checkpoint to go back to because of a spike, whose step is left out from then on; None: go on.

        last_checkpoint: asked where there is a spike to go back for; None where there is none yet.
        Comm: where there is such a spike, one all-gather. Raises a RankError after faults.max_rewinds.
        """
        if result.skipped:
            return None
        self._history, found = spikes.judge(self._history, result.loss, result.grad_norm, self._faults.spike_zscore)
        if found is None:
            return None
        wanted = self._faults.on_spike == "rewind"
        back_to = last_checkpoint() if wanted else None
        given_up = back_to is not None and len(self._rewinds) >= self._faults.max_rewinds
        told = {"kind": "spike", "outcome": f"back to {back_to}" if back_to and not given_up else "trained on"}
        told |= {"loss": result.loss, "grad_norm": result.grad_norm, **asdict(found)}
        place = self._notes.write(step + 1, told, self._engine.schedule.positions(step))
        line = f"step {step + 1}: {_describe(found)}; its text: {place}"
        if given_up:
            raise RankError(
                f"{line}; that is after {len(self._rewinds)} rewinds (faults.max_rewinds); lower --lr, mend the data, "
                "or go on with --faults.on-spike log",
                speaks=self._engine.mesh.rank == 0,
            )
        if back_to is None:
            self._say(f"{line}; there is no checkpoint to go back to" if wanted else line)
            return None
        self._say(f"{line}; going back to {back_to}, and on without step {step + 1}")
        self._write_rewind(Rewind(step + 1, step_of(back_to), found.what, found.value, found.zscore))
        return back_to

    def _write_rewind(self, rewind: Rewind) -> None:
        """For good, before anything follows from it."""
        together(lambda: add_rewind(self._notes.run, rewind) if self._engine.mesh.rank == 0 else None)
        self._rewinds.append(rewind)
        self._left_out.add(rewind.step)

    def _explain(self, step: int, result: StepResult) -> StepResult:
        """A step was skipped because something was not finite: what, where, and whether there is a way on."""
        again, first = retry_under_watch(self._engine, step, self._batches(step))
        again = replace(again, step_time_s=result.step_time_s + again.step_time_s)
        told = {"loss": result.loss, "grad_norm": result.grad_norm}
        positions = self._engine.schedule.positions(step)
        if not again.skipped:
            told |= {"kind": "machine", "outcome": "done again", "again": {"loss": again.loss, "norm": again.grad_norm}}
            place = self._notes.write(step + 1, told, positions)
            self._say(
                f"WARNING: step {step + 1} had a NaN or Inf ({_values(result)}), and none when it was done again: a "
                f"machine computes wrongly (memory, overheating). The second result counts. Written down: {place}"
            )
            self._n_bad = 0
            return again
        weight = weight_not_finite(self._engine)
        kind = "weight" if weight else "gradient" if math.isfinite(result.loss) else "loss"
        told |= {"kind": kind, "outcome": "skipped", "first": asdict(first) if first else None}
        told |= {"weight": asdict(weight)} if weight else {}
        place = self._notes.write(step + 1, told, first.samples if first else positions)
        self._n_bad += 1
        self._stop_if_hopeless(step, first, weight, place)
        self._say(f"step {step + 1} skipped ({_values(result)}): {_where(first)}; its text: {place}")
        return again

    def _stop_if_hopeless(self, step: int, first: Sighting | None, weight: Sighting | None, place: str) -> None:
        rank = self._engine.mesh.rank
        if self._config.debug.detect_nan:
            speaker = first.rank if first else 0
            name = f"{first.module} is the first module with a NaN or Inf" if first else _where(first)
            raise RankError(f"step {step + 1}, rank {speaker}: {name}; its text: {place}", speaks=rank == speaker)
        if weight:
            raise RankError(
                f"step {step + 1}: the weight {weight.module} holds a NaN or Inf on {weight.place}, host "
                f"{weight.host}: this run cannot recover; go back to its last checkpoint: --load {self._notes.run} "
                f"(more: {place})",
                speaks=rank == 0,
            )
        if self._n_bad >= self._faults.max_bad_steps:
            raise RankError(
                f"step {step + 1}: a NaN or Inf in {self._n_bad} steps in a row (faults.max_bad_steps): "
                f"{_where(first)}; lower --lr, lengthen --optim.warmup-steps, or look at the text: {place}",
                speaks=rank == 0,
            )


def _rewinds_of(run: Path) -> list[Rewind]:
    """As rank 0 reads them: on a shared disk another host may still see an older file."""
    box = [together(lambda: read_rewinds(run) if dist.get_rank() == 0 else [])]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _worst(loss: float) -> float:
    """The loss, or the one of another rank that is not finite: a rank alone may have computed wrongly."""
    losses = [loss] * dist.get_world_size()
    dist.all_gather_object(losses, loss)
    return next((value for value in losses if not math.isfinite(value)), loss)


def _values(result: StepResult) -> str:
    return f"loss {result.loss:.4g}, gradient norm {result.grad_norm:.3g}"


def _where(first: Sighting | None) -> str:
    if first is None:
        return "no module has it, only the sum of the gradients over micro-batches and ranks"
    return (
        f"first in {first.module} ({first.what}) on {first.place}, host {first.host}, micro-batch {first.micro_batch}"
    )


def _describe(spike: Spike) -> str:
    return (
        f"spike: {spike.what} {spike.value:.4g}, {spike.zscore:.0f} robust standard deviations above the median "
        f"{spike.median:.4g} of the steps before"
    )
