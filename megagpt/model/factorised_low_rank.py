"""Matrices of low rank: W = S R, with R (r, I) and S (O, r), over the model axis.

Only r numbers a token cross the axis where a dense layer sends its whole input or output: the factor beside the
residual stream is whole on every rank, the one beside the hidden width is shared out. The price is that r d_model
multiplications are done on every rank, and as many parameters held.
Shapes: I inputs, O outputs, R rank, _local a shard over the axis, packs the 2 matrices of a gated unit, else absent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.model.factorised_base import FactorisedColumn, FactorisedRow, two_factors
from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import copy_to
from megagpt.parallel.parameter import NamedNormal, replicated, sharded


class LowRankColumn(FactorisedColumn):
    """Outputs shared out: first (packs, R, I) replicated, second (packs, O_local, R).

    Comm: forward none; backward all-reduce over the axis of the gradient of the R numbers in the middle. So the
    gradients of x and of `first`, which follow from it, are equal on all ranks.
    """

    def __init__(
        self, n_inputs: int, n_outputs: int, rank: int, axis: Axis, draw: NamedNormal, *, packs: int, bias: bool
    ) -> None:
        super().__init__(n_outputs, axis, draw, packs, bias)
        first, second = two_factors(draw, n_inputs, (n_inputs, rank))
        self.first = replicated(first("first", (*self.packed, rank, n_inputs)))
        self.second = sharded(second("second", (*self.packed, n_outputs, rank)), len(self.packed), axis)

    def product(self, x_I: Tensor) -> Tensor:
        z_R = copy_to(F.linear(x_I, self.first.view(-1, self.first.shape[-1])), self.axis)
        seconds_OR = self.second.view(self.packs, -1, self.second.shape[-1])
        parts = [F.linear(z, second) for z, second in zip(z_R.chunk(self.packs, -1), seconds_OR, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


class LowRankRow(FactorisedRow):
    """Inputs shared out: first (R, I_local), second (O, R) replicated.

    Comm: forward all-reduce of the R numbers in the middle over the axis; backward none.
    """

    def __init__(self, n_inputs: int, n_outputs: int, rank: int, axis: Axis, draw: NamedNormal, *, bias: bool) -> None:
        super().__init__(n_outputs, axis, draw, bias)
        first, second = two_factors(draw, n_inputs, (n_inputs, rank))
        self.first = sharded(first("first", (rank, n_inputs)), 1, axis)
        self.second = replicated(second("second", (n_outputs, rank)))

    def product(self, x_I_local: Tensor) -> Tensor:
        return F.linear(self.summed(F.linear(x_I_local, self.first)), self.second)
