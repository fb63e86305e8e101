"""(configuration, world size) → Plan: batch arithmetic, stages, padding, FLOPs, memory of a run. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from megagpt.config import RunConfig
from megagpt.inventory.layers import TIED, Layer, layers, vocab_local
from megagpt.plan.fit import (
    check_attention,
    check_batch,
    check_lengths,
    check_lora,
    check_model,
    check_noise_scale,
    check_precision,
    check_world,
)
from megagpt.plan.memory import Memory, estimate_memory, micro_batches_in_flight
from megagpt.plan.partition import stage_bounds


@dataclass(frozen=True)
class Stage:
    """Layers first_layer … last_layer (included) of the layer list: what the ranks of a pipeline stage hold.

    params: elements of their logical tensors, a tied copy of the token matrix included.
    params_local: what one rank holds, padding included. memory: estimate of that rank.
    """

    first_layer: int
    last_layer: int
    n_blocks: int
    params: int
    params_local: int
    in_flight: int
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """What follows from a configuration and a number of processes.

    zero_stage: what DeepSpeed runs with, see `zero_stage_in_use`.
    micro_batches: of one data parallel rank in one step (gradient accumulation steps).
    bounds: pp + 1 indices into the layer list [embedding, block 0 … , head].
    params: elements of the model, each logical tensor once.
    vocab_local: rows of the vocabulary that one rank holds, padding included.
    flops_per_token: model FLOPs, forward and backward, see `model_flops_per_token`.
    """

    world_size: int
    tp: int
    pp: int
    dp: int
    zero_stage: int
    micro_batches: int
    batch_tokens: int
    bounds: tuple[int, ...]
    stages: tuple[Stage, ...]
    params: int
    vocab_local: int
    flops_per_token: int

    @property
    def vocab_padded(self) -> int:
        """Rows of the vocabulary over all ranks of the model axis, padding included."""
        return self.vocab_local * self.tp

    @property
    def bubble_fraction(self) -> float:
        """Share of a step that a stage waits: (pp - 1) / (micro_batches + pp - 1) (Huang et al. 2019)."""
        return (self.pp - 1) / (self.micro_batches + self.pp - 1)


def make_plan(config: RunConfig, world_size: int) -> Plan:
    """Derive the plan, checking everything that spans sections first; `config` is not changed.

    Raises: UserError, one line with a remedy, where the configuration and the world size do not fit together.
    """
    dp, micro_batches = _checked(config, world_size)
    model, parallel = config.model, config.parallel
    listed = layers(model, config.train.kernels, config.lora)
    bounds = stage_bounds(parallel.partition, listed, parallel.pp)
    stages = tuple(
        _stage(config, dp, micro_batches, number, first, listed[first:end], listed[0])
        for number, (first, end) in enumerate(pairwise(bounds))
    )
    return Plan(
        world_size=world_size,
        tp=parallel.tp,
        pp=parallel.pp,
        dp=dp,
        zero_stage=zero_stage_in_use(config, dp),
        micro_batches=micro_batches,
        batch_tokens=config.train.global_batch_size * model.seq_len,
        bounds=bounds,
        stages=stages,
        params=sum(layer.params for layer in listed),
        vocab_local=vocab_local(model, parallel.tp),
        flops_per_token=model_flops_per_token(listed),
    )


def _checked(config: RunConfig, world_size: int) -> tuple[int, int]:
    """The data parallel size and the micro-batches of a step.  Raises UserError, see `make_plan`."""
    check_model(config)
    check_attention(config)
    check_precision(config)
    check_lengths(config)
    check_lora(config)
    dp = check_world(config, world_size)
    micro_batches = check_batch(config, dp)
    check_noise_scale(config)
    return dp, micro_batches


def zero_stage_in_use(config: RunConfig, dp: int) -> int:
    """parallel.zero_stage, or 0 where ZeRO would only copy: one data parallel rank has nothing to share out.

    16 bits need its fp32 masters all the same, offload its way to the host, and a DeepSpeed JSON may ask more of it.
    """
    needed = config.train.precision != "fp32" or config.parallel.offload_optimizer or config.train.deepspeed_config
    return config.parallel.zero_stage if dp > 1 or needed else 0


def model_flops_per_token(layers: tuple[Layer, ...]) -> int:
    """FLOPs of forward and backward for one token: 6 N + 12 L I T where all layers are dense.

    N: elements of the matrices that multiply each token: the output matrix counts, the look-ups do not.
    L I T: layers × inner width × context, or what `inventory.layers.score_flops` says for other attention. It counts in
    full, as is usual, though a causal one needs half of it (6 N + 6 L I T). Recomputing does not count. Frozen matrices
    have no gradient: 4 N of theirs in place of 6 N.
    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    return sum(3 * layer.flops_per_token - layer.frozen_flops for layer in layers)


def _stage(
    config: RunConfig,
    dp: int,
    micro_batches: int,
    number: int,
    first: int,
    layers: tuple[Layer, ...],
    embedding: Layer,
) -> Stage:
    tp, pp = config.parallel.tp, config.parallel.pp
    is_first, is_last = number == 0, number == pp - 1
    held = [p for layer in layers for p in layer.parameters.values()]
    if is_last and not is_first and config.model.tied_embeddings:
        held.append(embedding.parameters[TIED.removeprefix(f"{embedding.name}.")])
    in_flight = micro_batches_in_flight(config.parallel, number, micro_batches)
    zero_stage = zero_stage_in_use(config, dp)
    return Stage(
        first_layer=first,
        last_layer=first + len(layers) - 1,
        n_blocks=len(layers) - is_first - is_last,
        params=sum(p.size for p in held),
        params_local=sum(p.local_size(tp) for p in held),
        in_flight=in_flight,
        memory=estimate_memory(config, dp, zero_stage=zero_stage, layers=layers, held=held, in_flight=in_flight),
    )
