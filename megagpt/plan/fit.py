"""What must fit together before anything heavy starts: each check gives one message, with the remedy."""

from __future__ import annotations

import math

from megagpt.config import ModelConfig, RunConfig
from megagpt.config.train import MAX_INCREMENTS
from megagpt.errors import UserError, divisors, require
from megagpt.inventory.attention import attention_lacks
from megagpt.model.mlp import MLPS
from megagpt.schedule import Schedule


def check_world(config: RunConfig, world_size: int) -> int:
    """The data parallel size: world_size / (tp * pp)."""
    tp, pp = config.parallel.tp, config.parallel.pp
    require(world_size >= 1, f"world size {world_size}", "is no number of processes", "use 1 or more")
    cell = tp * pp
    remedy = f"use a multiple of {cell} processes" + _other_layouts(config, world_size)
    got = f"world size {world_size} with parallel.tp={tp}, parallel.pp={pp}"
    require(world_size % cell == 0, got, f"is not a multiple of tp * pp = {cell}", remedy)
    return world_size // cell


def check_model(config: RunConfig) -> None:
    """Whether the vocabulary is known, and tensor parallelism can share the layers out."""
    if config.model.vocab_size is None:
        raise UserError("model.vocab_size is not known; give --vocab-size, or a tokenizer or dataset that records it")
    got, task = f"model.n_classes={config.model.n_classes} without finetune.task", config.finetune.task
    remedy = "leave it out; examples/finetune_gpt.py --task sets it"
    require(not config.model.n_classes or task is not None, got, "has nothing to answer", remedy, "model.n_classes")
    _check_tp(config.model, config.parallel.tp)


def _check_tp(model: ModelConfig, tp: int) -> None:
    """Whether so many ranks can share the heads, those of keys and values, and the MLP."""
    choices = ", ".join(map(str, divisors(model.n_heads)))
    require(model.n_heads % tp == 0, f"parallel.tp={tp}", f"must divide n_heads={model.n_heads}", f"try {choices}")
    MLPS[model.mlp](model).check_tp(tp)
    choices = ", ".join(str(n) for n in divisors(model.n_heads) if _shares_kv_heads(model, n))
    require(
        _shares_kv_heads(model, tp),
        f"parallel.tp={tp} with model.n_kv_heads={model.kv_heads}",
        "must divide it, or be a multiple of it",
        f"try {choices}",
    )


def _shares_kv_heads(model: ModelConfig, tp: int) -> bool:
    """Whether each rank gets whole heads of keys and values, or each such head a whole number of ranks."""
    return model.kv_heads % tp == 0 or tp % model.kv_heads == 0


def shares_model(model: ModelConfig, tp: int) -> bool:
    """Whether tp ranks can share every layer."""
    try:
        _check_tp(model, tp)
    except UserError:
        return False
    return True


def check_attention(config: RunConfig) -> None:
    """An attention that is asked for by name must have what the model's positions and dropout need of it."""
    choice, model = config.train.kernels["attention"], config.model
    lacks = attention_lacks(choice, model.position, model.dropout_attention)
    require(
        lacks is None,
        f"train.kernels={config.train.kernels}",
        f"asks for attention={choice}, which has no {lacks}",
        "use attention=auto, or attention=softmax",
    )


def check_lora(config: RunConfig) -> None:
    """Whether each target is a matrix: an adapter stands beside one, and not beside a product of several."""
    kind, targets = config.model.mlp, [t for t in config.lora.targets if t in ("up", "down")]
    require(
        config.lora.rank is None or not targets or not MLPS[kind].is_product,
        f"lora.targets={' '.join(config.lora.targets)} with model.mlp={kind}",
        f"needs dense matrices for {' and '.join(targets)}",
        "use --lora.targets qkv out",
        *("lora.targets", "model.mlp"),
    )


def check_precision(config: RunConfig) -> None:
    """16 bits need the fp32 masters that ZeRO-1 keeps: DeepSpeed has none, or cannot save them, at stage 0."""
    if config.train.precision != "fp32" and config.parallel.zero_stage == 0:
        raise UserError(
            f"train.precision={config.train.precision} with parallel.zero_stage=0 cannot work: "
            "16 bits need the fp32 masters of ZeRO 1; use --zero-stage 1 (free at dp=1)"
        )


def check_lengths(config: RunConfig) -> None:
    """Whether the sequence length warm-up leads to model.seq_len."""
    start, whole, increment = config.train.seq_len_start, config.model.seq_len, config.train.seq_len_increment
    got = f"train.seq_len_start={start}"
    require(start is None or start < whole, got, f"is not below model.seq_len={whole}", "lower it")
    n = 0 if start is None else (whole - start) // increment
    got = f"train.seq_len_increment={increment}"
    require(n <= MAX_INCREMENTS, got, f"makes {n:,} of them", "use a larger increment")


def check_batch(config: RunConfig, dp: int) -> int:
    """The micro-batches (gradient accumulation steps) of the whole batch: global batch / (micro-batch * dp).

    Every batch of a ramp must divide too, so that its sizes are those of the run on any layout.
    """
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    unit = micro * dp
    below, above = batch // unit * unit, (batch // unit + 1) * unit
    nearest = f"{below} or {above}" if below else str(above)
    micros = [m for m in divisors(batch // dp) if m < micro] if batch % dp == 0 else []
    require(
        batch % unit == 0,
        f"train.global_batch_size={batch} with micro_batch_size={micro}, dp={dp}",
        f"is not a multiple of micro_batch_size * dp = {unit}",
        f"use --global-batch-size {nearest}" + (f", or --micro-batch-size {micros[-1]}" if micros else ""),
    )
    _check_ramp(config, dp)
    return batch // unit


def check_noise_scale(config: RunConfig) -> None:
    """Whether a step has gradients of two batch sizes: the noise scale is told by their difference."""
    train = config.train
    require(
        not config.log.noise_scale or train.micro_batch_size < train.global_batch_size,
        f"log.noise_scale with micro_batch_size={train.micro_batch_size}",
        f"compares with the whole batch, of train.global_batch_size={train.global_batch_size}",
        "use a smaller --micro-batch-size or a larger --global-batch-size",
    )


def _check_ramp(config: RunConfig, dp: int) -> None:
    train, sizes = config.train, [phase.batch_size for phase in Schedule(config).phases]
    unit = train.micro_batch_size * dp
    bad = next((size for size in sizes if size % unit), None)
    if bad is None:
        return
    common = math.gcd(*sizes)
    micros = [m for m in divisors(common // dp) if m < train.micro_batch_size] if common % dp == 0 else []
    ramp = f"batch_steps='{train.batch_steps}'"
    if train.batch_ramp_start is not None:
        ramp = f"batch_ramp_start={train.batch_ramp_start}, batch_ramp_increment={train.batch_ramp_increment}"
    raise UserError(
        f"train.{ramp} makes batches of {bad}, with micro_batch_size={train.micro_batch_size}, dp={dp} no multiple of "
        f"micro_batch_size * dp = {unit}; use sizes that are"
        + (f", or --micro-batch-size {micros[-1]}" if micros else "")
    )


def _other_layouts(config: RunConfig, world_size: int) -> str:
    """Layouts that this world size allows, nearest first: ', or --tp 1 --pp 2'."""
    parallel, model = config.parallel, config.model
    fitting = [
        (tp, pp)
        for tp in divisors(world_size)
        if shares_model(model, tp)
        for pp in divisors(world_size // tp)
        if pp <= model.n_layers
    ]
    near = sorted(fitting, key=lambda layout: abs(layout[0] - parallel.tp) + abs(layout[1] - parallel.pp))
    return "".join(f", or --tp {tp} --pp {pp}" for tp, pp in near[:2])
