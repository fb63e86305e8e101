"""A published model and its recipe at a size that trains in seconds, with all that makes it special."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from megagpt.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from megagpt.config.pattern import Pattern
from megagpt.schedule import Schedule

N_HEADS, D_HEAD, VOCAB_SIZE = 4, 8, 211
BATCH_SIZE = 16


def shrunken(config: RunConfig, *, seq_len: int = 24, train_steps: int = 20) -> RunConfig:
    """The same run, small: 4 layers, 4 heads, `train_steps` steps of at most 16 sequences of `seq_len` tokens.

    Kept: the order of the block, norms, biases, positions, patterns, how heads share keys, the ratio of heads' and the
    MLP's width to the model's, tying, dropout, initial weights; optimizer, decay, schedule, what is added to the loss,
    and ramps, with their times as shares of the run. The rate is one that such a model learns from. Clipping is always
    active, so that it shows whether the norm is right.
    """
    model = _model(config.model, seq_len)
    train = _train(config.train, seq_len, train_steps)
    small = RunConfig(model=model, train=train)
    shares = (train_steps / config.train.train_steps, Schedule(small).total_tokens / Schedule(config).total_tokens)
    return replace(small, optim=_optim(config.optim, *shares))


def _model(model: ModelConfig, seq_len: int) -> ModelConfig:
    d_inner = N_HEADS * D_HEAD
    d_model = _multiple_of_8(d_inner * model.d_model / (model.n_heads * model.head_width))
    return replace(
        model,
        n_layers=max(4, len(model.attention)),
        d_model=d_model,
        n_heads=N_HEADS,
        n_kv_heads=max(1, N_HEADS * model.kv_heads // model.n_heads) if model.grouped else None,
        d_head=None if d_model == d_inner else D_HEAD,
        d_ff=None if model.ff_width == 4 * model.d_model else _multiple_of_8(d_model * model.ff_width / model.d_model),
        seq_len=seq_len,
        vocab_size=VOCAB_SIZE,
        attention=tuple(_pattern(pattern, seq_len / model.seq_len) for pattern in model.attention),
        logit_scale=1.0 if model.logit_scale == 1 else round(model.logit_scale * math.sqrt(model.d_model / d_model), 3),
        mlp_rank=None if model.mlp_rank is None else 8,
        mlp_blocks=None if model.mlp_blocks is None else 4,
    )


def _pattern(pattern: Pattern, share: float) -> Pattern:
    """A pattern that reaches this share as far: its first number is a distance, or the size of its blocks."""
    if pattern.kind == "dense":
        return pattern
    first, *others = pattern.numbers
    return Pattern(pattern.kind, (max(2, round(first * share)), *others))


def _train(train: TrainConfig, seq_len: int, train_steps: int) -> TrainConfig:
    ramps: dict[str, Any] = {}
    if train.batch_ramp_tokens is not None:
        ramps = {"batch_ramp_start": BATCH_SIZE // 2, "batch_ramp_tokens": train_steps // 4 * BATCH_SIZE * seq_len}
    elif train.batch_steps:
        last_change = max(train.batch_steps) / train.train_steps
        ramps = {"batch_steps": f"{BATCH_SIZE // 2}@1,{BATCH_SIZE}@{1 + math.ceil(train_steps * last_change)}"}
    return TrainConfig(train_steps=train_steps, global_batch_size=BATCH_SIZE, micro_batch_size=BATCH_SIZE // 2, **ramps)


def _optim(optim: OptimConfig, of_steps: float, of_tokens: float) -> OptimConfig:
    def shrink(value: int | None, share: float) -> int | None:
        return None if value is None else max(1, round(value * share))

    return replace(
        optim,
        lr=3e-2 if optim.optimizer.startswith("adafactor") else 1e-2,
        warmup_from=1e-5 if optim.warmup_from else 0.0,
        warmup_steps=min(3, optim.warmup_steps),
        warmup_tokens=shrink(optim.warmup_tokens, of_tokens),
        hold_steps=min(10, optim.hold_steps),
        decay_steps=shrink(optim.decay_steps, of_steps),
        decay_tokens=shrink(optim.decay_tokens, of_tokens),
        eps=1e-6,  # or Adam would divide one layout's round-off by another's where a gradient is nothing but that
        clip=0.2,
    )


def _multiple_of_8(width: float) -> int:
    return max(8, 8 * round(width / 8))
