"""Micro-batches of a step: a pure function of the positions that it reads, which follow from the step alone.

They are cut into chunks of micro_batch_size × dp_size, of which each data-parallel rank takes its slice (Megatron's
sampler). Where sequences are to be shorter than the samples, the first tokens of each are taken.
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
    """What one process handles at a time. B: micro_batch_size, T: seq_len of the step; all int64.

    `labels_BT[b, t]` is the token after `tokens_BT[b, t]`. `sample_ids_B` are positions in the training
    order, unique over the run: dropout is keyed by them, not by where a sample is computed.
    """

    tokens_BT: Tensor  # noqa: N815
    labels_BT: Tensor  # noqa: N815
    sample_ids_B: Tensor  # noqa: N815


def micro_batches(
    samples: TokenSamples, config: RunConfig, positions: range, seq_len: int, *, dp_rank: int, dp_size: int
) -> Iterator[MicroBatch]:
    """The micro-batches of one data-parallel rank in a step that reads these positions over all ranks, in order.

    Their number is a multiple of micro_batch_size * dp_size: the plan has checked every batch of the run.
    **Raises** `UserError` when the samples end before the batch does; and, at the micro-batch that has it, for a token
    that the model has no embedding for.
    """
    micro_batch_size = config.train.micro_batch_size
    chunk = micro_batch_size * dp_size
    if not 0 <= positions.start < positions.stop <= len(samples):
        raise UserError(
            f"a step reads samples {positions.start} to {positions.stop - 1} of {len(samples)}; "
            "build samples for more steps"
        )
    # A generator of its own, so that the check above comes at the call and not at the first batch.
    starts = range(positions.start + dp_rank * micro_batch_size, positions.stop, chunk)
    return (
        _micro_batch(samples, range(start, start + micro_batch_size), seq_len, config.model.vocab) for start in starts
    )


def _micro_batch(samples: TokenSamples, positions: range, seq_len: int, vocab_size: int) -> MicroBatch:
    text = torch.from_numpy(np.stack([samples[position][: seq_len + 1] for position in positions]))
    if not 0 <= int(text.min()) <= int(text.max()) < vocab_size:
        bad = int(text.max()) if int(text.max()) >= vocab_size else int(text.min())
        raise UserError(
            f"samples {positions.start} to {positions[-1]} hold token {bad}, the vocabulary has {vocab_size}; "
            "the data was made by another tokenizer (tools/inspect_data.py --verify finds the place)"
        )
    return MicroBatch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), torch.tensor(positions))
