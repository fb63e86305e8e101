"""A run's steps: the schedule, what is counted, measured and averaged; over a backend, which does the passes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megagpt.checkpoint.adapters import load_base
from megagpt.checkpoint.load import load_masters
from megagpt.checkpoint.state import State
from megagpt.config import RunConfig
from megagpt.data.loader import MicroBatch
from megagpt.optim.average import keep_average
from megagpt.optim.build import set_rate
from megagpt.parallel.mesh import Mesh
from megagpt.processes.agree import together
from megagpt.schedule import Schedule
from megagpt.train.measure.noise_scale import NoiseMeter
from megagpt.train.step.backend import SKIPPED, Backend
from megagpt.train.step.deepspeed.backend import start_deepspeed
from megagpt.train.step.masters import Masters

if TYPE_CHECKING:
    from megagpt.plan.plan import Plan


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step gave; the same on every rank.

    skipped: something was not finite (or the step was to be left out): weights, moments and Adam's count are as before.
    """

    loss: float
    grad_norm: float
    lr: float
    loss_scale: float
    skipped: bool
    step_time_s: float
    noise_scale_tokens: float | None = None


class Engine:
    """The model, its optimizer and what a run knows of its steps, spread over the mesh."""

    def __init__(self, config: RunConfig, plan: Plan, mesh: Mesh, begin: bool = True) -> None:
        """begin: with first weights; else `load` must follow, which gives it all of them. Frozen ones are those of
        `lora.base`, or without one first weights.

        Comm: collective over all ranks.  Raises UserError where the machine or a DeepSpeed JSON does not fit.
        """
        self.config, self.plan, self.mesh, self.schedule = config, plan, mesh, Schedule(config)
        self.backend: Backend = start_deepspeed(config, plan, mesh)
        self.parameters, self.device = self.backend.parameters, self.backend.device
        self.masters = Masters(self.backend, config.optim)
        if begin:
            self.masters.begin(config.train.seed)
        self._fill_frozen()
        if config.optim.ema_decay is not None:
            keep_average(self.backend.optimizer, config.optim.ema_decay)
        self._before = self.counters
        self.noise = NoiseMeter(self.masters.parameters, mesh, self.backend.tied) if config.log.noise_scale else None

    def _fill_frozen(self) -> None:
        frozen, set_weight = self.backend.frozen, self.backend.set_weight
        if self.config.lora.base is not None:
            together(lambda: load_base(frozen, self.config, set_weight))
            return
        for segment in frozen:
            set_weight(segment, segment.named.beginning(segment.shape, self.config.train.seed).elements)

    def train_step(self, step: int, batches: Iterable[MicroBatch]) -> StepResult:
        """One optimizer step over this rank's micro-batches of global step `step`.

        Where a loss or gradient is not finite on any rank, the optimizer does not move on any (see `grad_norm.py`).
        Comm: the backend's, and where the noise scale is measured, its.
        """
        start = time.perf_counter()
        lr = self.schedule.learning_rate(step)
        n_sequences, seq_len = self.schedule.batch_size(step), self.schedule.seq_len(step)
        set_rate(self.backend.optimizer, lr, self.config.optim)
        self._before = self.counters
        loss_scale = self.backend.loss_scale
        if self.noise:
            self.noise.begin()
        outcome = self.backend.step(batches, n_sequences, seq_len)
        if outcome.skipped:
            self.set_counters(step + 1, self.counters)  # apex counts a step without gradients as one
        elif self.noise:
            micro_batch_size = self.config.train.micro_batch_size
            n_micro_batches = n_sequences // (micro_batch_size * self.mesh.data.size)
            sizes = micro_batch_size * seq_len, n_sequences * seq_len
            self.noise.measure(outcome.grad_norm, loss_scale / n_micro_batches, *sizes)
        return StepResult(
            loss=outcome.loss,
            grad_norm=outcome.grad_norm,
            lr=lr,
            loss_scale=self.backend.loss_scale,
            skipped=outcome.skipped,
            step_time_s=time.perf_counter() - start,
            noise_scale_tokens=self.noise.scale.tokens if self.noise else None,
        )

    def retry_step(self, step: int, batches: Iterable[MicroBatch]) -> StepResult:
        """The step that was just skipped, from the state that it met: bit for bit the same, unless a machine errs.

        Comm: as `train_step`.
        """
        self.set_counters(step, self._before)
        return self.train_step(step, batches)

    def skip_step(self, step: int) -> StepResult:
        """Leave a step out: what is counted goes on by one, and nothing else moves. Comm: none."""
        counters = self.counters
        self.backend.write_counters({**counters, SKIPPED: counters[SKIPPED] + 1})
        lr, loss_scale = self.schedule.learning_rate(step), self.backend.loss_scale
        return StepResult(math.nan, math.nan, lr, loss_scale, skipped=True, step_time_s=0.0)

    def evaluate(self, batches: Iterable[MicroBatch], n_micro_batches: int) -> float:
        """Mean loss, in nats per token, over this rank's n_micro_batches of whole sequences and all data ranks.

        Comm: the backend's.
        """
        return self.backend.evaluate(batches, n_micro_batches)

    @property
    def counters(self) -> dict[str, float]:
        """Steps skipped so far, and all that the loss scale follows from: what a checkpoint keeps."""
        return self.backend.read_counters()

    def set_counters(self, step: int, counters: dict[str, float]) -> None:
        """Count as after `step` steps, of which the counters say how many were skipped; the optimizer counts others."""
        self.backend.write_counters(counters)
        self.masters.set_step(step - int(counters[SKIPPED]))

    def load(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> State:
        """Be as the run was that wrote this checkpoint, whatever its layout.

        say: told of tensors that only one of them has, where the configuration allows that.
        Comm: collective over all ranks.  Raises a RankError where the architectures differ, or a file cannot be read.
        """
        state = load_masters(self.masters, self.config, folder, say)
        self.set_counters(state.step, state.counters)
        if self.noise:
            self.noise.go_on_from(state.noise_scale)
        return state

    def close(self) -> None:
        """Tear down; without it some finished runs hang or abort at exit."""
        self.backend.close()
