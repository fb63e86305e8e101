"""Projections onto whole heads, of which keys and values may have fewer than the axis has processes.

Shapes: I inputs, H heads, R rows of a head, _local a shard over the axis.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import copy_to
from megagpt.parallel.parameter import DEFAULT_DRAW, Draw, replicated, sharded


class HeadsLinear(nn.Module):
    """y = x Wᵀ + b for this rank's heads: its share of n_heads or, where there are more ranks than heads, its one head.

    x comes through `copy_to` already, which queries and keys share: one all-reduce of its gradient for both.
    With fewer heads than ranks every rank holds all of the weight, and neighbours use the same head of it: rank r of n
    the head r * n_heads // n. Its gradient is summed over the axis, so that it is whole, and equal, on each rank.

    Shapes: x (*, I) → y (*, H_local * R), H_local at least 1.  weight (H_local * R, I) or whole (H * R, I), bias alike.
    Comm: forward none; backward, for a whole weight, all-reduce of its gradient over the axis.
    Source: Shazeer 2019 (multi-query); Ainslie et al. 2023 (grouped-query).
    Raises ValueError unless n_heads divides the axis or the other way round.
    """

    def __init__(
        self, n_inputs: int, n_heads: int, n_rows: int, axis: Axis, draw: Draw = DEFAULT_DRAW, *, bias: bool = True
    ) -> None:
        super().__init__()
        if n_heads % axis.size and axis.size % n_heads:
            raise ValueError(f"got {n_heads} heads on an axis of {axis.size} processes, wanted one to divide the other")
        self.axis, self.n_rows = axis, n_rows
        self.head = axis.rank * n_heads // axis.size if n_heads < axis.size else None
        n_outputs = n_heads * n_rows
        self.weight = self._parameter(draw("weight", (n_outputs, n_inputs)))
        self.bias = self._parameter(draw("bias", (n_outputs,))) if bias else None

    def forward(self, x_I: Tensor) -> Tensor:
        return F.linear(x_I, self._rows(self.weight), None if self.bias is None else self._rows(self.bias))

    def _parameter(self, full: Tensor) -> nn.Parameter:
        return sharded(full, 0, self.axis) if self.head is None else replicated(full)

    def _rows(self, parameter: Tensor) -> Tensor:
        if self.head is None:
            return parameter
        return copy_to(parameter, self.axis).narrow(0, self.head * self.n_rows, self.n_rows)
