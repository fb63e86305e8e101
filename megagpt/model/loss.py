"""Cross-entropy over logits whose vocabulary is shared out: the logits are never gathered."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.ops.cross_entropy import Statistics, cross_entropy
from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import all_reduce
from megagpt.parallel.parameter import Part


@dataclass(frozen=True)
class LossTerms:
    """What training adds to the negative log-likelihood: in its gradient, and not in the loss that is shown."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    language: float = 0.0
    """Of a classifier: weight of the language-modelling loss beside that of its answers."""


PLAIN = LossTerms()


def vocab_parallel_cross_entropy(
    logits_BTV: Tensor,
    labels_BT: Tensor,
    part: Part,
    axis: Axis,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    plain_value: bool = False,
    in_place: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """Loss of each label, in float32 (float64 for float64 logits); by default the negative log-likelihood.

    part: which rows of the output matrix the columns are (`part_of(weight)`); further columns are padding.
    plain_value, in_place: as in ops/cross_entropy.py.
    Shapes: logits_BTV (this rank's columns, padded), labels_BT int64 global ids → loss_BT, equal on all ranks.
    Comm: forward two all-reduces over the axis, of N and of 3N floats for N tokens; backward none.
    Source: Shoeybi et al. 2019, section 3 (fused output and loss); see ops/cross_entropy.py for the rest.
    """
    loss_N = cross_entropy(
        logits_BTV.flatten(0, -2),
        labels_BT.flatten(),
        n_valid=part.length,
        first=part.start,
        vocab=part.shape[0],
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        plain_value=plain_value,
        combine=None if axis.size == 1 else lambda statistics: _of_all_ranks(statistics, axis),
        in_place=in_place,
        kernels=kernels,
    )
    return loss_N.view(labels_BT.shape)


def _of_all_ranks(statistics: Statistics, axis: Axis) -> Statistics:
    """Relative to the largest logit of all ranks: no overflow, and no digits lost where logits are large."""
    top_N = all_reduce(statistics.top, axis, dist.ReduceOp.MAX)
    _, *sums = statistics.relative_to(top_N)
    return Statistics(top_N, *all_reduce(torch.stack(sums), axis))
