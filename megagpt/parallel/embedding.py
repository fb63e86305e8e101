"""The token embedding, its rows shared out over a mesh axis. Its weight is the output matrix too when tied."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import copy_to, gather_from, reduce_from
from megagpt.parallel.parameter import Declared, part_of
from megagpt.parallel.product import product


class VocabParallelEmbedding(nn.Module):
    """One row per token; a rank holds a contiguous range of the vocabulary, padded in memory.

    Shapes: tokens_BT int64 → x_BTD replicated.  weight (V_local, D).
    Comm: forward all-reduce over the axis; backward none.
    Source: Shoeybi et al. 2019, section 3.
    """

    def __init__(self, declared: Declared, axis: Axis) -> None:
        super().__init__()
        self.axis = axis
        self.weight = declared.make("weight", axis)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        if self.axis.size == 1:
            return F.embedding(tokens_BT, self.weight)
        part = part_of(self.weight)
        local_BT = tokens_BT - part.start
        elsewhere_BT = (local_BT < 0) | (local_BT >= part.length)
        x_BTD = F.embedding(local_BT.masked_fill(elsewhere_BT, 0), self.weight)
        return reduce_from(x_BTD.masked_fill(elsewhere_BT.unsqueeze(-1), 0.0), self.axis)


def vocab_parallel_logits(x_BTD: Tensor, weight: nn.Parameter, axis: Axis) -> Tensor:
    """Scores of this rank's part of the vocabulary, its padding included.

    Shapes: x_BTD replicated, weight (V_local, D) → logits_BTV, V = V_local.
    Comm: forward none; backward all-reduce of the input's gradient over the axis.
    """
    return product(copy_to(x_BTD, axis), weight)


def gather_logits(logits_BTV: Tensor, vocab_size: int, axis: Axis) -> Tensor:
    """All scores, without padding, on every rank: for sampling, not for the loss.

    Shapes: logits_BTV (this rank's columns, padded or not) → (B, T, vocab_size).  Comm: all-gather over the axis.
    """
    chunk = -(-vocab_size // axis.size)
    logits_BTV = F.pad(logits_BTV, (0, chunk - logits_BTV.shape[-1]))  # below 0 it cuts: ranks send equally much
    return gather_from(logits_BTV, axis)[..., :vocab_size]
