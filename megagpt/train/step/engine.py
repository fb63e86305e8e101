"""One face for both of DeepSpeed's engines: train a step, evaluate, and nothing of which of them runs."""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from megagpt.config import RunConfig
from megagpt.data.loader import MicroBatch
from megagpt.errors import UserError
from megagpt.model.loss import PLAIN, LossTerms
from megagpt.optim.average import keep_average
from megagpt.optim.build import build_optimizer, set_rate
from megagpt.optim.mesh_optimizer import MeshOptimizer
from megagpt.parallel.mesh import Mesh
from megagpt.plan.plan import Plan
from megagpt.schedule import Schedule
from megagpt.train.measure.noise_scale import NoiseMeter
from megagpt.train.step.finite import nan_to_gradient, watch_uncounted
from megagpt.train.step.masters import SKIPPED, create_moments, read_counters, write_counters
from megagpt.train.step.segments import find_segments
from megagpt.train.step.settings import deepspeed_settings
from megagpt.train.step.stages import GPTStage, build_module, global_grad_norm, loss_terms


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
    """The model, its optimizer and DeepSpeed, spread over the mesh."""

    def __init__(self, config: RunConfig, plan: Plan, mesh: Mesh) -> None:
        self.config, self.plan, self.mesh, self.schedule = config, plan, mesh, Schedule(config)
        connect_deepspeed()
        _require_precision(config.train.precision)
        module, self.parameters = build_module(config, plan, mesh)
        self.base_optimizer, self.optimizer_name = build_optimizer(self.parameters, config)
        if plan.zero_stage == 0:
            self.base_optimizer.register_step_pre_hook(self._clip)
        self.module = module
        self.engine: Any
        self.optimizer: Any
        with contextlib.redirect_stdout(io.StringIO()):  # in bf16 it prints the memory of each of its steps
            self.engine, self.optimizer, _, _ = deepspeed.initialize(
                model=module,
                optimizer=self.base_optimizer,
                config=deepspeed_settings(config, plan),
                mpu=None if mesh.pipe.size > 1 else ModelParallelUnit(mesh),  # pipelines bring their own grid
                dist_init_required=False,
            )
        self.has_stages = isinstance(self.engine, PipelineEngine)
        if plan.dp == 1 and (plan.zero_stage == 0 or isinstance(self.optimizer, BF16_Optimizer)):
            # Nothing to reduce: DeepSpeed would copy all gradients to and fro. Its other optimizers need that call.
            self.engine.enable_backward_allreduce = self.engine.pipeline_enable_backward_allreduce = False
        if plan.zero_stage > 0:
            watch_uncounted(self.optimizer, self.parameters, mesh)
        self.segments = find_segments(self.parameters, self.optimizer, mesh, self.device)
        if isinstance(self.base_optimizer, MeshOptimizer):
            self.base_optimizer.bind(self.segments)
        create_moments(self)
        if config.optim.ema_decay is not None:
            keep_average(self.base_optimizer, config.optim.ema_decay)
        self._before = read_counters(self)
        self.noise = self._noise_meter() if config.log.noise_scale else None
        self._terms = loss_terms(config)
        self._seq_len = config.model.seq_len  # of the last micro-batches

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.engine.device

    def train_step(self, step: int, batches: Iterable[MicroBatch]) -> StepResult:
        """One optimizer step over this rank's micro-batches of global step `step`.

        Where a loss or gradient is not finite on any rank, the optimizer does not move on any (see `finite.py`).
        Comm: the step's own (pipeline sends, gradient reductions), and one all-reduce of the loss.
        """
        start = time.perf_counter()
        lr = self.schedule.learning_rate(step)
        set_rate(self.optimizer, lr, self.config.optim)
        self._before = read_counters(self)
        self._set_batch(self.schedule.batch_size(step))
        self._set_seq_len(self.schedule.seq_len(step))
        gradient_scale = self._loss_scale() / self.engine.gradient_accumulation_steps()
        if self.noise:
            self.noise.begin()
        if self.has_stages:
            loss = self.engine.train_batch(self._as_pipeline_data(batches))
        else:
            loss = self._accumulate(batches)
        skipped = self.engine.skipped_steps > self._before[SKIPPED]
        if skipped:
            write_counters(self, step + 1, read_counters(self))  # apex counts a step without gradients as one
        grad_norm = float(self.engine.get_global_grad_norm() or 0.0)
        if self.noise and not skipped:
            sequences = self.config.train.micro_batch_size, self.schedule.batch_size(step)
            self.noise.measure(grad_norm, gradient_scale, *(n * self.schedule.seq_len(step) for n in sequences))
        return StepResult(
            loss=float(loss),
            grad_norm=grad_norm,
            lr=lr,
            loss_scale=self._loss_scale(),
            skipped=skipped,
            step_time_s=time.perf_counter() - start,
            noise_scale_tokens=self.noise.scale.tokens if self.noise else None,
        )

    def retry_step(self, step: int, batches: Iterable[MicroBatch]) -> StepResult:
        """The step that was just skipped, from the state that it met: bit for bit the same, unless a machine errs.

        Comm: as `train_step`.
        """
        write_counters(self, step, self._before)
        return self.train_step(step, batches)

    def skip_step(self, step: int) -> StepResult:
        """Leave a step out: what is counted goes on by one, and nothing else moves. Comm: none."""
        self.engine.skipped_steps += 1
        lr, scale = self.schedule.learning_rate(step), self._loss_scale()
        return StepResult(math.nan, math.nan, lr, scale, skipped=True, step_time_s=0.0)

    def evaluate(self, batches: Iterable[MicroBatch], n_micro_batches: int) -> float:
        """Mean loss, in nats per token, over this rank's n_micro_batches of whole sequences and all data ranks."""
        self._set_seq_len(self.config.model.seq_len)
        if self.has_stages:
            data = self._as_pipeline_data(batches)
            return float(self.engine.eval_batch(data, num_micro_batches=n_micro_batches))
        self.engine.eval()
        total = torch.zeros((), device=self.device)
        with torch.no_grad():
            for batch in batches:
                total += self._loss(batch, PLAIN).float()
        self.engine.train()
        return float(self._mean_over_data(total / n_micro_batches))

    def close(self) -> None:
        """Tear down; without it some finished runs hang or abort at exit."""
        self.engine.destroy()

    def _accumulate(self, batches: Iterable[MicroBatch]) -> Tensor:
        total = torch.zeros((), device=self.device)
        for batch in batches:
            loss = self._loss(batch, self._terms)
            self.engine.backward(loss)
            self.engine.step()
            total += loss.detach().float()
        return self._mean_over_data(total / self.engine.gradient_accumulation_steps())

    def _noise_meter(self) -> NoiseMeter:
        tied = self.module.get_tied_weights_and_groups() if isinstance(self.module, GPTStage) else []
        return NoiseMeter(self.parameters, self.mesh, tied)

    def _set_batch(self, size: int) -> None:
        """Tell DeepSpeed how many sequences the next step has, over all processes."""
        self.engine.set_train_batch_size(size)
        self.engine.micro_steps = 0  # it looks for the end of a step by the remainder of this: of the old size else

    def _set_seq_len(self, seq_len: int) -> None:
        """Let pipeline stages tell each other the shape of activations anew, where it is another one."""
        if self.has_stages and seq_len != self._seq_len:
            self.engine.reset_activation_shape()
        self._seq_len = seq_len

    def _loss_scale(self) -> float:
        return float(getattr(self.optimizer, "cur_scale", None) or getattr(self.optimizer, "loss_scale", 1.0))

    def _loss(self, batch: MicroBatch, terms: LossTerms) -> Tensor:
        tokens_BT, labels_BT, ids_B = (
            t.to(self.device) for t in (batch.tokens_BT, batch.labels_BT, batch.sample_ids_B)
        )
        return nan_to_gradient(self.engine(tokens_BT, ids_B, labels_BT, terms))

    def _mean_over_data(self, value: Tensor) -> Tensor:
        if self.mesh.data.size > 1:
            dist.all_reduce(value, group=self.mesh.data.group)
        return value / self.mesh.data.size

    @staticmethod
    def _as_pipeline_data(batches: Iterable[MicroBatch]) -> Iterator[tuple[tuple[Tensor, Tensor], Tensor]]:
        for batch in batches:
            yield (batch.tokens_BT, batch.sample_ids_B), batch.labels_BT

    def _clip(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        """Before the step of ZeRO stage 0: clip by the true global norm, and tell DeepSpeed what it was.

        Where it is not finite, there is to be no step: without gradients the optimizer moves nothing.
        """
        norm = global_grad_norm(self.parameters, self.mesh)
        optimizer._global_grad_norm = norm  # type: ignore[attr-defined]  # where DeepSpeed looks for it
        optimizer.overflow = not bool(torch.isfinite(norm))  # type: ignore[attr-defined]  # and for this: to count it
        clip = self.config.optim.clip
        if optimizer.overflow:  # type: ignore[attr-defined]
            for named in self.parameters:
                named.parameter.grad = None
        elif clip > 0:
            scale = torch.clamp(clip / (norm + 1e-6), max=1.0)
            grads = [n.parameter.grad for n in self.parameters if n.parameter.grad is not None]
            torch._foreach_mul_(grads, scale)


def connect_deepspeed() -> None:
    """Let DeepSpeed use the process group that is there already.

    On a CPU it would first compile a shared-memory op that only its inference uses: half a minute at the first start,
    and a hang at every later one if that was interrupted. Its own table of usable ops is where that is declined.
    """
    # A whole table in place of one entry: asked for its own, DeepSpeed runs the C compiler first, at every start.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.init_distributed(verbose=False)


def _require_precision(precision: str) -> None:
    accelerator = get_accelerator()
    assert accelerator is not None
    if precision == "fp16" and not accelerator.is_fp16_supported():
        raise UserError("train.precision=fp16 needs a GPU: this CPU computes in fp32 and bf16; use --precision bf16")


class ModelParallelUnit:
    """Our mesh as DeepSpeed wants to see it where there are no pipeline stages (its `mpu`)."""

    def __init__(self, mesh: Mesh) -> None:
        self.model, self.data = mesh.model, mesh.data

    def get_model_parallel_rank(self) -> int:
        return self.model.rank

    def get_model_parallel_world_size(self) -> int:
        return self.model.size

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.model.group

    def get_data_parallel_rank(self) -> int:
        return self.data.rank

    def get_data_parallel_world_size(self) -> int:
        return self.data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.data.group
