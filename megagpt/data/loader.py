"""Micro-batches of a step: a pure function of the step, so that resuming needs only an integer.

Step s trains on positions [s·G, (s + 1)·G) of the samples, whatever the layout. They are cut into chunks of
micro_batch_size × dp_size, of which each data-parallel rank takes its slice (Megatron's sampler).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megagpt.config import RunConfig
from megagpt.errors import UserError


class TokenSamples(Protocol):
    """Training samples: GPTSamples, a Blend of them, or anything that gives int64[seq_len + 1] for an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> np.ndarray: ...


@dataclass(frozen=True)
class MicroBatch:
    """What one process handles at a time. B: micro_batch_size, T: seq_len; all int64.

    `labels_BT[b, t]` is the token after `tokens_BT[b, t]`. `sample_ids_B` are positions in the training
    order, unique over the run: dropout is keyed by them, not by where a sample is computed.
    """

    tokens_BT: Tensor  # noqa: N815
    labels_BT: Tensor  # noqa: N815
    sample_ids_B: Tensor  # noqa: N815


def micro_batches(
    samples: TokenSamples, config: RunConfig, *, step: int, dp_rank: int, dp_size: int
) -> Iterator[MicroBatch]:
    """The micro-batches of one data-parallel rank in one step (counted from 0), in order.

    **Raises** `UserError` when the global batch does not divide, or the samples end before the step does; and, at the
    micro-batch that has it, for a token that the model has no embedding for.
    """
    global_batch_size, micro_batch_size = config.train.global_batch_size, config.train.micro_batch_size
    chunk = micro_batch_size * dp_size
    if global_batch_size % chunk:
        raise UserError(
            f"train.global_batch_size={global_batch_size} must be a multiple of micro_batch_size * dp = "
            f"{micro_batch_size} * {dp_size} = {chunk}; try {-(-global_batch_size // chunk) * chunk}"
        )
    first, end = step * global_batch_size, (step + 1) * global_batch_size
    if not 0 <= first < end <= len(samples):
        raise UserError(
            f"step {step} reads samples {first} to {end - 1} of {len(samples)}; build samples for more steps"
        )
    # A generator of its own, so that the checks above come at the call and not at the first batch.
    starts = range(first + dp_rank * micro_batch_size, end, chunk)
    return (_micro_batch(samples, range(start, start + micro_batch_size), config.model.vocab) for start in starts)


def positions_of(config: RunConfig, step: int) -> range:
    """The positions of the samples that step `step` of the training (counted from 0) reads, over all ranks."""
    first = 0 if config.debug.overfit_one_batch else step * config.train.global_batch_size
    return range(first, first + config.train.global_batch_size)


def _micro_batch(samples: TokenSamples, positions: range, vocab_size: int) -> MicroBatch:
    text = torch.from_numpy(np.stack([samples[position] for position in positions]))
    if not 0 <= int(text.min()) <= int(text.max()) < vocab_size:
        bad = int(text.max()) if int(text.max()) >= vocab_size else int(text.min())
        raise UserError(
            f"samples {positions.start} to {positions[-1]} hold token {bad}, the vocabulary has {vocab_size}; "
            "the data was made by another tokenizer (tools/inspect_data.py --verify finds the place)"
        )
    return MicroBatch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), torch.tensor(positions))
