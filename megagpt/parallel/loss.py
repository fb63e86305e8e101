"""Cross-entropy over logits whose vocabulary is shared out: the logits are never gathered.

Shapes: N tokens, V this rank's part of the vocabulary with its padding, L the part without (`part.length`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import all_reduce
from megagpt.parallel.parameter import Part


def vocab_parallel_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor, part: Part, axis: Axis) -> Tensor:
    """Negative log-likelihood of each label, in float32 (float64 for float64 logits).

    Shapes: logits_BTV (this rank's columns, padded), labels_BT int64 global ids → nll_BT, equal on all ranks.
    part: which rows of the output matrix the columns are (`part_of(weight)`); further columns are padding.
    Comm: forward three all-reduces of N floats over the axis; backward none.
    Source: Shoeybi et al. 2019, section 3 (fused output and loss).
    """
    nll_N = _CrossEntropy.apply(logits_BTV.flatten(0, -2), labels_BT.flatten(), part, axis)
    return nll_N.view(labels_BT.shape)  # type: ignore[union-attr]


class _CrossEntropy(torch.autograd.Function):
    """Keeps the logits and two numbers a token; probabilities: a few rows at a time, never kept."""

    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, part: Part, axis: Axis) -> Tensor:
        wide = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
        logits_NL = logits_NV[:, : part.length]
        local_top_N = logits_NV.new_full(labels_N.shape, -torch.inf, dtype=wide)  # what a rank without tokens has
        local_total_N = torch.zeros_like(local_top_N)
        for rows in _chunks(logits_NL):
            local_top_N[rows] = logits_NL[rows].amax(-1).to(wide)
            local_total_N[rows] = torch.sub(logits_NL[rows], local_top_N[rows, None]).exp_().sum(-1)
        # Relative to the largest logit of all ranks: no overflow, and no digits lost where logits are large.
        top_N = all_reduce(local_top_N, axis, dist.ReduceOp.MAX)
        total_N = all_reduce(local_total_N * (local_top_N - top_N).exp(), axis)
        local_N = labels_N - part.start
        here_N = (local_N >= 0) & (local_N < part.length)
        index_N = local_N.masked_fill(~here_N, 0)
        label_logit_N = logits_NV.gather(1, index_N[:, None]).squeeze(1) - top_N
        nll_N = total_N.log() - all_reduce(label_logit_N.masked_fill(~here_N, 0.0), axis)
        ctx.save_for_backward(logits_NV, top_N, total_N, here_N, index_N)
        ctx.length = part.length
        return nll_N

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad_N,) = grads
        logits_NV, top_N, total_N, here_N, index_N = ctx.saved_tensors
        logits_NL = logits_NV[:, : ctx.length]
        d_logits_NV = torch.empty_like(logits_NV)
        d_logits_NV[:, ctx.length :] = 0
        # d nll / d logits = p - onehot(label), p = exp(logit - top) / total
        scale_N, d_label_N = grad_N / total_N, (-grad_N).masked_fill(~here_N, 0.0)
        for rows in _chunks(logits_NL):
            p_NL = torch.sub(logits_NL[rows], top_N[rows, None]).exp_().mul_(scale_N[rows, None])
            p_NL.scatter_add_(1, index_N[rows, None], d_label_N[rows, None])
            d_logits_NV[rows, : ctx.length] = p_NL
        return d_logits_NV, None, None, None


def _chunks(logits_NL: Tensor) -> Iterator[slice]:
    """Ranges of rows, none where L = 0: small enough for a CPU's caches, large enough to keep a GPU busy."""
    n_rows, width = logits_NL.shape
    if width:
        step = max(1, (2**24 if logits_NL.is_cuda else 2**20) // width)
        for begin in range(0, n_rows, step):
            yield slice(begin, begin + step)
