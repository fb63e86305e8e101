"""A job as the cost model sees it: a model, a layout, and what the engine that runs it does. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from megagpt.config import ModelConfig
from megagpt.inventory.layers import Layer, layers, vocab_local
from megagpt.plan.machine import Machine
from megagpt.plan.partition import balance

Recompute = Literal["none", "selective", "full"]
ScheduleName = Literal["1f1b", "interleaved", "zero_bubble"]


@dataclass(frozen=True)
class Layout:
    """How a job is spread: sizes of the axes, and what a micro-batch is. Ranks: tensor innermost, pipeline outermost.

    virtual: stages that a rank holds.  shard: data parallel ranks that ZeRO shares out over; 0 is all of them.
    """

    gpus: int
    tp: int = 1
    pp: int = 1
    virtual: int = 1
    dp: int = 1
    cp: int = 1
    zero: int = 0
    shard: int = 0
    micro_batch: int = 1
    global_batch: int = 1
    recompute: Recompute = "none"
    sequence_parallel: bool = False
    schedule: ScheduleName = "1f1b"

    @property
    def micro_batches(self) -> int:
        """Of one data parallel rank in one step."""
        return max(1, self.global_batch // (self.micro_batch * self.dp))

    @property
    def shards(self) -> int:
        """Ranks that one copy of what ZeRO shares out lies on; context parallel ranks hold the same weights too."""
        return self.shard or self.dp * self.cp


@dataclass(frozen=True)
class Engine:
    """What the software does, as far as time and memory depend on it.

    flash: attention keeps no scores.  fp8: matrix products of blocks in 8 bits.  grad_bytes: of a gradient that is
    kept and reduced.  overlap_tp, overlap_grads, overlap_params, overlap_p2p: runs that communication beside work.
    async_tp: issues the tensor axis's collectives as asynchronous calls from autograd functions.
    scatter_p2p: sends a pipeline's activations once over the tensor axis.
    stages: have equally many blocks (even), equal work (work), or as many as pass their share of all work, with the
    block that passes it (passing).
    dropout: keeps its masks.  fused: elementwise chains are one kernel each.  fused_wgrad: the product that makes a
    weight's gradient adds it up.  gathers: pieces of a block that ZeRO-3 gathers one by one.
    """

    flash: bool = True
    fp8: bool = False
    grad_bytes: int = 4
    overlap_tp: bool = False
    overlap_grads: bool = False
    overlap_params: bool = False
    overlap_p2p: bool = False
    async_tp: bool = False
    scatter_p2p: bool = False
    stages: Literal["even", "work", "passing"] = "even"
    dropout: bool = False
    fused: bool = True
    fused_wgrad: bool = False
    gathers: int = 1


@dataclass(frozen=True)
class Job:
    """What runs where."""

    model: ModelConfig
    layout: Layout
    engine: Engine
    machine: Machine

    @cached_property
    def tokens(self) -> int:
        """Of a micro-batch on one rank of the context axis."""
        return self.layout.micro_batch * self.model.seq_len // self.layout.cp

    @cached_property
    def stage_blocks(self) -> tuple[int, ...]:
        """Blocks of each stage, the virtual ones of all ranks in their order."""
        return _blocks(self.model, self.layout.pp * self.layout.virtual, self.engine.stages)


@cache
def _blocks(model: ModelConfig, n_stages: int, rule: str) -> tuple[int, ...]:
    """Blocks of each stage by a rule of `Engine.stages`."""
    if rule == "passing":
        return _passing(model, n_stages)
    if rule == "work":
        listed = layers_of(model)
        return tuple(
            balance([layer.flops_per_token for layer in listed[1:-1]], n_stages, 0, listed[-1].flops_per_token)
        )
    whole, more = divmod(model.n_layers, n_stages)
    return tuple(whole + (stage < more) for stage in range(n_stages))


def _passing(model: ModelConfig, n_stages: int) -> tuple[int, ...]:
    """nanotron's rule (models/base.py, build_model): costs are the elements of the blocks' and the head's matrices."""
    costs = [sum(p.size for p in layer.parameters.values() if p.kind == "map") for layer in layers_of(model)[1:-1]]
    whole, counts, stage, passed = sum(costs) + model.vocab * model.d_model, [0] * n_stages, 0, 0
    for cost in costs:
        counts[stage] += 1
        passed += cost
        if passed > whole * (stage + 1) / n_stages and stage < n_stages - 1:
            stage += 1
    return tuple(counts)


@cache
def layers_of(model: ModelConfig) -> tuple[Layer, ...]:
    """The inventory's list, made once a model."""
    return layers(model)


@cache
def local_params(model: ModelConfig, tp: int) -> tuple[int, int, int]:
    """Parameters that one of tp ranks holds: of the embedding, of a block, of the head beyond a tied embedding."""
    listed = layers_of(model)
    sizes = [sum(p.local_size(tp) for p in layer.parameters.values()) for layer in (listed[0], listed[1], listed[-1])]
    return sizes[0], sizes[1], sizes[2]


@cache
def vocab_rows(model: ModelConfig, tp: int) -> int:
    """Rows of the vocabulary on one of tp ranks."""
    return vocab_local(model, tp)


def step_flops(model: ModelConfig, global_batch: int) -> float:
    """Model FLOPs of a step, forward and backward: PaLM's 6 N + 12 L I T a token, the look-ups not counted."""
    return 3.0 * sum(layer.flops_per_token for layer in layers_of(model)) * global_batch * model.seq_len
