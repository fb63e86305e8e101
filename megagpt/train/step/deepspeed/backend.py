"""DeepSpeed's engines as a `Backend`: the plain one (ZeRO 0 to 3, offload) and, with stages, its pipeline engine."""

from __future__ import annotations

import contextlib
import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from torch import Tensor, nn

from megagpt.config import RunConfig
from megagpt.data.loader import MicroBatch
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.model.loss import PLAIN, LossTerms
from megagpt.optim.build import build_optimizer, freeze
from megagpt.optim.segments import Elements, Segment
from megagpt.parallel.collectives import all_reduce
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.parameter import Named, named_parameters, trained
from megagpt.train.step.backend import SKIPPED, Backend, Outcome
from megagpt.train.step.deepspeed import zero
from megagpt.train.step.deepspeed.settings import deepspeed_settings
from megagpt.train.step.deepspeed.stages import GPTStage, give_memory_here, loss_terms
from megagpt.train.step.grad_norm import clip, global_grad_norm, nan_to_gradient

if TYPE_CHECKING:
    from megagpt.plan.plan import Plan

# Its names of what its loss scaler counts, which checkpoints keep.
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def start_deepspeed(config: RunConfig, plan: Plan, mesh: Mesh) -> Backend:
    """Build this rank's layers, whose weights have no values yet, and start the engine that trains them.

    Comm: collective over all ranks.  Raises UserError where the machine or the user's JSON does not fit.
    """
    _connect()
    _require_precision(config.train.precision)
    return (_PipelineEngine if mesh.pipe.size > 1 else _PlainEngine)(config, plan, mesh)


class _DeepSpeedBackend(ABC):
    """What both engines have in common."""

    def __init__(self, config: RunConfig, plan: Plan, mesh: Mesh) -> None:
        self._config, self._mesh = config, mesh
        self.layers: list[tuple[str, nn.Module]]
        self.parameters: list[Named]
        self.tied: list[tuple[Tensor, dist.ProcessGroup]]
        module = self._build(config, plan, mesh)
        settings = deepspeed_settings(config, plan, on_gpu=torch.cuda.is_available())
        mpu = None if mesh.pipe.size > 1 else ModelParallelUnit(mesh)  # pipelines bring their own grid
        if plan.zero_stage == 3:
            zero.shard_at_birth(module, settings, mpu)
        _mark_sharded(self.parameters)
        learning = trained(self.parameters)
        freeze(learning, config)
        self.optimizer, self.optimizer_name = build_optimizer(learning, config)
        if plan.zero_stage == 0:
            self.optimizer.register_step_pre_hook(self._clip)
        self._engine: Any
        self._zero: Any  # its optimizer around ours; without ZeRO ours itself
        with contextlib.redirect_stdout(io.StringIO()):  # in bf16 it prints the memory of each of its steps
            self._engine, self._zero, _, _ = deepspeed.initialize(
                model=module,
                optimizer=self.optimizer,
                config=settings,
                mpu=mpu,
                dist_init_required=False,
            )
        if plan.dp == 1 and (plan.zero_stage == 0 or isinstance(self._zero, BF16_Optimizer)):
            # Nothing to reduce: DeepSpeed would copy all gradients to and fro. Its other optimizers need that call.
            self._engine.enable_backward_allreduce = self._engine.pipeline_enable_backward_allreduce = False
        if plan.zero_stage > 0:
            zero.watch_uncounted(self._zero, learning, mesh)
        self.device: torch.device = self._engine.device
        self.data_replicas = plan.zero_stage < 3
        self.segments = zero.find_segments(learning, self._zero, mesh, self.device)
        self.frozen = [zero.frozen_segment(n, mesh) for n in self.parameters if not n.declared.trained]

    @abstractmethod
    def _build(self, config: RunConfig, plan: Plan, mesh: Mesh) -> nn.Module:
        """What DeepSpeed is to train; sets `layers`, `parameters` and `tied`."""

    @abstractmethod
    def _train(self, batches: Iterable[MicroBatch], seq_len: int) -> Tensor:
        """One optimizer step; the mean loss over all micro-batches and data ranks."""

    def step(self, batches: Iterable[MicroBatch], n_sequences: int, seq_len: int) -> Outcome:
        n_skipped = self._engine.skipped_steps
        self._engine.set_train_batch_size(n_sequences)
        self._engine.micro_steps = 0  # it looks for the end of a step by the remainder of this: of the old size else
        loss = float(self._train(batches, seq_len))
        grad_norm = float(self._engine.get_global_grad_norm() or 0.0)
        return Outcome(loss, grad_norm, skipped=self._engine.skipped_steps > n_skipped)

    @property
    def loss_scale(self) -> float:
        return float(getattr(self._zero, "cur_scale", None) or getattr(self._zero, "loss_scale", 1.0))

    def read_counters(self) -> dict[str, float]:
        scaler = self._loss_scaler()
        of_scaler = {name: getattr(scaler, name) for name in SCALER} if scaler else {}
        return {SKIPPED: self._engine.skipped_steps, **of_scaler}

    def write_counters(self, counters: dict[str, float]) -> None:
        self._engine.skipped_steps = int(counters[SKIPPED])
        scaler = self._loss_scaler()
        for name in SCALER:
            if scaler and name in counters:  # a run that was not in fp16 left none
                setattr(scaler, name, counters[name])

    def local_weights(self, named: Named) -> list[Tensor]:
        return zero.local_weights(named.parameter)

    def set_weight(self, segment: Segment, elements: Elements) -> None:
        zero.set_weight(segment, elements)

    def close(self) -> None:
        self._engine.destroy()

    def _loss_scaler(self) -> DynamicLossScaler | None:
        scaler = getattr(self._zero, "loss_scaler", None)
        return scaler if isinstance(scaler, DynamicLossScaler) else None

    def _clip(self, optimizer: Any, args: object, kwargs: object) -> None:
        """Before the step of ZeRO stage 0: clip by the true global norm, and tell DeepSpeed what it was.

        Its own counts a tied weight twice there, and under a pipeline skips unsharded weights of later stages.
        """
        norm = global_grad_norm(self.parameters, self._mesh)
        optimizer._global_grad_norm = norm  # where DeepSpeed looks for it
        optimizer.overflow = not clip(self.parameters, norm, self._config.optim.clip)  # and for this: to count it


class _PlainEngine(_DeepSpeedBackend):
    """Without pipeline stages: the whole model on each rank of the data axis."""

    def _build(self, config: RunConfig, plan: Plan, mesh: Mesh) -> nn.Module:
        kernels = config.train.kernels
        recompute, seed = config.parallel.recompute, config.train.seed
        model = GPT(config.model, mesh.model, seed, recompute, kernels, empty=True, lora=config.lora)
        if plan.zero_stage < 3:
            give_memory_here(model, config.train.precision)
        blocks = [(f"blocks.{i}", block) for i, block in enumerate(model.blocks)]
        self.layers = [("embedding", model.embedding), *blocks, ("head", model.head)]
        self.parameters, self.tied = named_parameters(model), []
        return model

    def _train(self, batches: Iterable[MicroBatch], seq_len: int) -> Tensor:
        total, terms = torch.zeros((), device=self.device), loss_terms(self._config)
        for batch in batches:
            loss = self._loss(batch, terms)
            self._engine.backward(loss)
            self._engine.step()
            total += loss.detach().float()
        return self._mean_over_data(total / self._engine.gradient_accumulation_steps())

    def evaluate(self, batches: Iterable[MicroBatch], n_micro_batches: int) -> float:
        self._engine.eval()
        total = torch.zeros((), device=self.device)
        with torch.no_grad():
            for batch in batches:
                total += self._loss(batch, PLAIN).float()
        self._engine.train()
        return float(self._mean_over_data(total / n_micro_batches))

    def _loss(self, batch: MicroBatch, terms: LossTerms) -> Tensor:
        tokens_BT, ids_B, *positions = (t.to(self.device) for t in batch.inputs)
        targets = tuple(t.to(self.device) for t in batch.targets)
        return nan_to_gradient(self._engine(tokens_BT, ids_B, targets, terms, *positions))

    def _mean_over_data(self, value: Tensor) -> Tensor:
        return all_reduce(value, self._mesh.data) / self._mesh.data.size


class _PipelineEngine(_DeepSpeedBackend):
    """With pipeline stages: ZeRO 0 and 1, since it keeps gradients over micro-batches, which ZeRO 2 shards away."""

    def _build(self, config: RunConfig, plan: Plan, mesh: Mesh) -> nn.Module:
        stage = GPTStage(config, plan, mesh)
        self.layers, self.parameters = stage.canonical_layers(), stage.canonical_parameters()
        self.tied = stage.get_tied_weights_and_groups()
        self._seq_len = config.model.seq_len  # of the last micro-batches
        return stage

    def _train(self, batches: Iterable[MicroBatch], seq_len: int) -> Tensor:
        self._set_seq_len(seq_len)
        return self._engine.train_batch(_as_pipeline_data(batches))

    def evaluate(self, batches: Iterable[MicroBatch], n_micro_batches: int) -> float:
        self._set_seq_len(self._config.model.seq_len)
        return float(self._engine.eval_batch(_as_pipeline_data(batches), num_micro_batches=n_micro_batches))

    def _set_seq_len(self, seq_len: int) -> None:
        """Its stages agree on the shape of activations once: let them do it anew, where it is another one."""
        if seq_len != self._seq_len:
            self._engine.reset_activation_shape()
        self._seq_len = seq_len


def _as_pipeline_data(batches: Iterable[MicroBatch]) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    for batch in batches:
        yield batch.inputs, batch.targets


def _connect() -> None:
    """Let DeepSpeed use the process group that is there already.

    On a CPU it would first compile a shared-memory op that only its inference uses: half a minute at the first start,
    and a hang at every later one if that was interrupted. Its own table of usable ops is where that is declined.
    """
    # A whole table in place of one entry: asked for its own, DeepSpeed runs the C compiler first, at every start.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}  # pyright: ignore[reportAttributeAccessIssue]
    deepspeed.init_distributed(verbose=False)


def _mark_sharded(parameters: list[Named]) -> None:
    """DeepSpeed's norm counts a parameter on every rank of the model axis only if it carries this flag."""
    for named in parameters:
        named.parameter.model_parallel = named.part.dim is not None  # type: ignore[attr-defined]


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
