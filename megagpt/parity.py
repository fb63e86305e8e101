"""One run, any layout: train the same few steps on many layouts and compare what comes out.

The promise: losses, gradient norms and final weights do not depend on tp, pp, dp, the ZeRO stage, the micro-batch size
or recompute, up to float32 round-off, with clipping active and dropout on. The bounds are in `Bounds`, with reasons.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megagpt.data.loader import micro_batches
from megagpt.engine.engine import Engine, StepResult
from megagpt.engine.masters import read
from megagpt.engine.storage import WEIGHT
from megagpt.parallel.local import run_ranks
from megagpt.parallel.mesh import build_mesh
from megagpt.plan.plan import make_plan


@dataclass(frozen=True)
class Layout:
    """How one parity run is spread out."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    zero_stage: int = 0
    micro_batch_size: int = 4
    recompute: bool = False
    offload_optimizer: bool = False

    @property
    def world_size(self) -> int:
        """Processes it needs."""
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        extras = " recompute" * self.recompute + " offload" * self.offload_optimizer
        return f"tp={self.tp} pp={self.pp} dp={self.dp} zero={self.zero_stage} micro={self.micro_batch_size}{extras}"


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: per step loss and gradient norm (relative comparison), and the logical weights by name."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Bounds:
    """Allowed differences.

    loss, grad_norm: relative, at any step. Summation orders differ between layouts, each changing a float32 sum by some
    1e-7; 20 steps of training amplify that a little.
    weight: absolute, as a share of the distance that Adam can move a weight (sum of learning rates). Where a gradient
    is zero but for round-off (the key biases: softmax ignores them), Adam divides noise by noise, so that a bound at
    round-off level would not hold for those even between two correct runs; eps = 1e-6 keeps such noise small.
    """

    loss: float = 1e-5
    grad_norm: float = 1e-4
    weight: float = 1e-3


@dataclass(frozen=True)
class Difference:
    """Largest differences of a run from the reference, and the first tensor beyond the bound, if any."""

    loss: float
    grad_norm: float
    weight: float
    first_bad_tensor: str | None
    ok: bool


REFERENCE = Layout(micro_batch_size=8)
STEPS = 20


def parity_config(model: ModelConfig | None = None) -> RunConfig:
    """A small model with all that could break the promise: three dropouts, clipping, decay, an odd vocabulary."""
    model = model or ModelConfig(
        n_layers=4, d_model=32, n_heads=4, seq_len=24, vocab_size=211,
        dropout_embedding=0.1, dropout_attention=0.1, dropout_residual=0.1,
    )  # fmt: skip
    return RunConfig(
        model=model,
        optim=OptimConfig(lr=3e-3, warmup_steps=5, clip=0.3, eps=1e-6),
        train=TrainConfig(train_steps=STEPS, global_batch_size=8, micro_batch_size=8),
    )


def all_layouts(max_processes: int = 8) -> list[Layout]:
    """Every allowed combination of sizes and ZeRO stage, each with two micro-batch sizes and recompute on and off."""
    found = []
    for tp, pp, dp in itertools.product((1, 2, 4), repeat=3):
        if tp * pp * dp > max_processes:
            continue
        for zero_stage in (0, 1) if pp > 1 else (0, 1, 2, 3):
            found.append(Layout(tp, pp, dp, zero_stage, micro_batch_size=1, recompute=False))
            found.append(Layout(tp, pp, dp, zero_stage, micro_batch_size=2, recompute=True))
        if pp == 1:
            found.append(Layout(tp, pp, dp, 2, micro_batch_size=2, offload_optimizer=True))
    return found


def run_layout(config: RunConfig, layout: Layout, timeout_s: float = 240.0) -> Outcome:
    """Train config's steps on a layout, on processes of this machine; what rank 0 saw, and the gathered weights."""
    config = dataclasses.replace(
        config,
        parallel=ParallelConfig(
            tp=layout.tp,
            pp=layout.pp,
            zero_stage=layout.zero_stage,  # type: ignore[arg-type]
            recompute=layout.recompute,
            offload_optimizer=layout.offload_optimizer,
        ),
        train=dataclasses.replace(config.train, micro_batch_size=layout.micro_batch_size),
    )
    ranks = run_ranks(_train, layout.world_size, config, layout.dp, timeout_s=timeout_s)
    steps: list[StepResult] = ranks[0][0]
    for other, _ in ranks:
        if [(s.loss, s.grad_norm) for s in other] != [(s.loss, s.grad_norm) for s in steps]:
            raise AssertionError(f"{layout}: ranks report different losses or gradient norms")
    return Outcome([s.loss for s in steps], [s.grad_norm for s in steps], _merge([parts for _, parts in ranks]))


def compare(outcome: Outcome, reference: Outcome, config: RunConfig, bounds: Bounds | None = None) -> Difference:
    """Largest differences between two runs, against the bounds."""
    bounds = bounds or Bounds()
    loss = _relative(outcome.losses, reference.losses)
    norm = _relative(outcome.grad_norms, reference.grad_norms)
    reach = config.optim.lr * len(reference.losses)
    if outcome.weights.keys() != reference.weights.keys():
        raise AssertionError(f"tensors differ: {sorted(outcome.weights.keys() ^ reference.weights.keys())[:5]}")
    worst, first_bad = 0.0, None
    for name, expected in reference.weights.items():
        difference = float((outcome.weights[name] - expected).abs().max()) / reach
        worst = max(worst, difference)
        if first_bad is None and not difference <= bounds.weight:
            first_bad = name
    ok = loss <= bounds.loss and norm <= bounds.grad_norm and first_bad is None
    return Difference(loss, norm, worst, first_bad, ok)


def walk(config: RunConfig, layouts: list[Layout]) -> Iterator[tuple[Layout, Difference]]:
    """Run the reference, then each layout, and yield its difference."""
    reference = run_layout(config, REFERENCE)
    if not max(reference.grad_norms) > config.optim.clip:
        raise AssertionError("clipping was never active: the walk would prove nothing about it")
    for layout in layouts:
        yield layout, compare(run_layout(config, layout), reference, config)


class _Tokens:
    """Sample i is a function of i alone."""

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.vocab_size, self.seq_len = vocab_size, seq_len

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, i: int) -> np.ndarray:
        # a repeating pattern per sample, so that there is something to learn and losses move
        pattern = np.random.default_rng(i).integers(0, self.vocab_size, size=7)
        return np.resize(pattern, self.seq_len + 1).astype(np.int64)


def _train(config: RunConfig, dp: int) -> tuple[list[StepResult], list[tuple[str, int | None, int, Tensor]]]:
    mesh = build_mesh("cpu", pp=config.parallel.pp, dp=dp, tp=config.parallel.tp)
    plan = make_plan(config, dist.get_world_size())
    engine = Engine(config, plan, mesh)
    samples = _Tokens(config.model.vocab, config.model.seq_len)
    steps = []
    for step in range(config.train.train_steps):
        batches = micro_batches(
            samples,
            step=step,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            dp_rank=mesh.data.rank,
            dp_size=mesh.data.size,
        )
        steps.append(engine.train_step(step, batches))
    parts = []
    for named in engine.parameters:
        value = read(engine, named, WEIGHT).cpu().clone()
        if named.owned and mesh.data.rank == 0 and (named.part.dim is not None or mesh.model.rank == 0):
            parts.append((named.name, named.part.dim, mesh.model.rank, value))
    engine.close()
    return steps, parts


def _merge(ranks: list[list[tuple[str, int | None, int, Tensor]]]) -> dict[str, Tensor]:
    """Put the parts of all ranks together into logical tensors, in the order of the model."""
    found: dict[str, dict[int, tuple[int | None, Tensor]]] = {}
    for parts in ranks:
        for name, dim, index, value in parts:
            found.setdefault(name, {})[index] = (dim, value)
    merged = {}
    for name, parts_by_index in found.items():
        pieces = [parts_by_index[i][1] for i in sorted(parts_by_index)]
        dim = parts_by_index[0][0]
        merged[name] = pieces[0] if dim is None else torch.cat(pieces, dim)
    return merged


def _relative(values: list[float], expected: list[float]) -> float:
    return max(abs(v - e) / abs(e) for v, e in zip(values, expected, strict=True))
