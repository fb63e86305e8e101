"""Micro-batches of a step: a pure function of the positions that it reads, which follow from the step alone.

They are cut into chunks of micro_batch_size × dp_size, of which each data-parallel rank takes its slice (Megatron's
sampler). Where sequences are to be shorter than the samples, the first tokens of each are taken. Samples that are more
than a stretch of text (rows of packed examples) make their micro-batches themselves.

Shapes: B micro_batch_size, T tokens of a row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megagpt.config import RunConfig
from megagpt.data.targets import Answers, Targets
from megagpt.errors import UserError


class TokenSamples(Protocol):
    """Training samples: GPTSamples, a Blend of them, or anything that gives int64[seq_len + 1] for an index."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> np.ndarray: ...


@dataclass(frozen=True)
class MicroBatch:
    """What one process handles at a time. B: micro_batch_size, T: seq_len of the step; int64 but for weights.

    `labels_BT[b, t]` is the token after `tokens_BT[b, t]`. `sample_ids_B` are positions in the training
    order, unique over the run: dropout is keyed by them, not by where a sample is computed.
    `positions_BT`: where tokens stand in their documents, where a row holds several that do not see each other.
    `weights_BT`, `answers`: as in `Targets`.
    """

    tokens_BT: Tensor  # noqa: N815
    labels_BT: Tensor  # noqa: N815
    sample_ids_B: Tensor  # noqa: N815
    positions_BT: Tensor | None = None  # noqa: N815
    weights_BT: Tensor | None = None  # noqa: N815
    answers: Answers | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the first layer is given: tokens, ids, and positions where there are any."""
        return self.tokens_BT, self.sample_ids_B, *(() if self.positions_BT is None else (self.positions_BT,))

    @property
    def targets(self) -> tuple[Tensor, ...]:
        """What the loss is given, see `Targets.of`."""
        return Targets(self.labels_BT, self.weights_BT, self.answers).wire


class Rows(ABC):
    """Samples that are more than a stretch of text, and make micro-batches themselves."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, i: int) -> np.ndarray:
        """Tokens of row i, to be looked at.  Shapes: int64[T]."""

    @abstractmethod
    def sources_of(self, i: int) -> list[tuple[str, int, int, int]]:
        """The pieces of row i, in order: (file, line, first token, number of tokens)."""

    @abstractmethod
    def micro_batch(self, positions: range, step: range) -> MicroBatch:
        """The rows at these positions.  step: those of the whole step, over which weights are shares."""


def micro_batches(
    samples: TokenSamples | Rows, config: RunConfig, positions: range, seq_len: int, *, dp_rank: int, dp_size: int
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
    if isinstance(samples, Rows):
        make = partial(samples.micro_batch, step=positions)
    else:
        make = partial(_micro_batch, samples, seq_len=seq_len, vocab_size=config.model.vocab)
    return (make(range(start, start + micro_batch_size)) for start in starts)


def _micro_batch(samples: TokenSamples, positions: range, seq_len: int, vocab_size: int) -> MicroBatch:
    text = torch.from_numpy(np.stack([samples[position][: seq_len + 1] for position in positions]))
    if not 0 <= int(text.min()) <= int(text.max()) < vocab_size:
        bad = int(text.max()) if int(text.max()) >= vocab_size else int(text.min())
        raise UserError(
            f"samples {positions.start} to {positions[-1]} hold token {bad}, the vocabulary has {vocab_size}; "
            "the data was made by another tokenizer (tools/inspect_data.py --verify finds the place)"
        )
    return MicroBatch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), torch.tensor(positions))
