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
    scatter_p2p: sends a pipeline's activations once over the tensor axis.  even_blocks: stages have equally many blocks;
    otherwise equal work.  dropout: keeps its masks.  compiled: elementwise chains and launches are fused by a compiler.
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
    even_blocks: bool = True
    dropout: bool = False
    compiled: bool = False


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
        listed, n_stages = layers_of(self.model), self.layout.pp * self.layout.virtual
        if self.engine.even_blocks:
            whole, more = divmod(self.model.n_layers, n_stages)
            return tuple(whole + (stage < more) for stage in range(n_stages))
        weights = [layer.flops_per_token for layer in listed[1:-1]]
        return tuple(balance(weights, n_stages, 0, listed[-1].flops_per_token))


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
