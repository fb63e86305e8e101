"""Cross-entropy over logits whose vocabulary is shared out: the logits are never gathered.

Shapes: N tokens, V this rank's part of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import all_reduce
from megagpt.parallel.parameter import Part


def vocab_parallel_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor, part: Part, axis: Axis) -> Tensor:
    """Negative log-likelihood of each label, in float32 (float64 for float64 logits).

    Shapes: logits_BTV (this rank's columns, padded), labels_BT int64 global ids → nll_BT, equal on all ranks.
    part: which rows of the output matrix the columns are (`part_of(weight)`); columns from part.length on are padding.
    Comm: forward three all-reduces of N floats over the axis; backward none.
    Source: Shoeybi et al. 2019, section 3 (fused output and loss).
    """
    nll_N = _CrossEntropy.apply(logits_BTV.flatten(0, -2), labels_BT.flatten(), part, axis)
    return nll_N.view(labels_BT.shape)  # type: ignore[union-attr]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV: Tensor, labels_N: Tensor, part: Part, axis: Axis) -> Tensor:
        wide = torch.float64 if logits_NV.dtype == torch.float64 else torch.float32
        # log_softmax is one well-vectorised pass; it gives the local normaliser as well: logit - log p.
        # Padding columns take no part: -inf before, 0 after. The logits are nobody else's, so this is done in place.
        logits_NV[:, part.length :] = -torch.inf
        log_p_NV = torch.log_softmax(logits_NV, dim=-1, dtype=wide)
        local_N = labels_N - part.start
        elsewhere_N = (local_N < 0) | (local_N >= part.length)
        index_N1 = local_N.masked_fill(elsewhere_N, 0).unsqueeze(-1)
        log_p_label_N = log_p_NV.gather(1, index_N1).squeeze(-1)
        shift_N = None
        if axis.size == 1:
            nll_N = -log_p_label_N
        else:
            local_lse_N = logits_NV[:, 0].to(wide) - log_p_NV[:, 0]
            top_N = all_reduce(local_lse_N, axis, dist.ReduceOp.MAX)
            lse_N = top_N + all_reduce((local_lse_N - top_N).exp(), axis).log()
            shift_N = local_lse_N - lse_N  # log p over the whole vocabulary = local log p + shift
            nll_N = -all_reduce((log_p_label_N + shift_N).masked_fill(elsewhere_N, 0.0), axis)
        ctx.save_for_backward(log_p_NV, shift_N, index_N1, elsewhere_N)
        ctx.dtype = logits_NV.dtype
        return nll_N

    @staticmethod
    def backward(ctx, grad_N: Tensor):
        log_p_NV, shift_N, index_N1, elsewhere_N = ctx.saved_tensors
        # d nll / d logits = p - onehot(label)
        p_NV = (log_p_NV if shift_N is None else log_p_NV + shift_N.unsqueeze(-1)).exp()
        p_NV.scatter_add_(1, index_N1, elsewhere_N.to(p_NV.dtype).sub(1.0).unsqueeze(-1))
        return p_NV.mul_(grad_N.unsqueeze(-1)).to(ctx.dtype), None, None, None
