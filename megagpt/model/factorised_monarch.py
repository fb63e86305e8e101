"""Monarch matrices (Dao et al. 2022): two block-diagonal factors with a permutation between, over the model axis.

Seen as a whole, W is a grid of b x b blocks, and the block in row j and column k is a product of its own, of R columns
of second[j] and R rows of first[k]: R = ceil(min(I, O) / b²), 1 where b² is the width, as in the paper. A rank of the
axis holds rows of the grid (up) or columns (down), so that nothing is done twice and nothing more is sent than by
a dense layer. The paper's last permutation only renames outputs, and is left out: a part of them is whole blocks then.
Shapes: N tokens, K blocks across, J blocks down, W width and H height of a block (I = K W, O = J H), R its rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt.inventory.factorised_sizes import monarch_grid
from megagpt.model.factorised_base import FactorisedColumn, FactorisedRow, two_factors
from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import copy_to
from megagpt.parallel.parameter import NamedNormal, sharded


def grid_product(x_I: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """x (*, K W), first (K, J R, W), second (J, H, K R) → y (*, J H): the paper's L Pᵀ R x."""
    K, _, W = first.shape
    J, H, _ = second.shape
    x_KNW = x_I.reshape(-1, K, W).transpose(0, 1)
    z_KNJR = torch.bmm(x_KNW, first.transpose(1, 2)).unflatten(2, (J, -1))
    z_JNKR = z_KNJR.permute(2, 1, 0, 3).flatten(2)
    y_JNH = torch.bmm(z_JNKR, second.transpose(1, 2))
    return y_JNH.transpose(0, 1).reshape(*x_I.shape[:-1], J * H)


class MonarchColumn(FactorisedColumn):
    """Outputs shared out: first (packs, K, J_local R, W), second (packs, J_local, H, K R).

    Comm: forward none; backward all-reduce of the input's gradient over the axis.
    Source: Dao et al. 2022, section 3.1.
    """

    def __init__(
        self, n_inputs: int, n_outputs: int, blocks: int, axis: Axis, draw: NamedNormal, *, packs: int, bias: bool
    ) -> None:
        super().__init__(n_outputs, axis, draw, packs, bias)
        grid = monarch_grid(n_inputs, n_outputs, blocks)
        first, second = two_factors(draw, n_inputs, (grid.width, grid.n_across * grid.rank))
        dim = len(self.packed)
        self.first = sharded(first("first", (*self.packed, blocks, blocks * grid.rank, grid.width)), dim + 1, axis)
        self.second = sharded(second("second", (*self.packed, blocks, grid.height, blocks * grid.rank)), dim, axis)

    def product(self, x_I: Tensor) -> Tensor:
        first, second = self.first, self.second
        if self.packs > 1:  # the grids of a gated unit are one, twice as high
            first, second = first.transpose(0, 1).flatten(1, 2), second.flatten(0, 1)
        return grid_product(copy_to(x_I, self.axis), first, second)


class MonarchRow(FactorisedRow):
    """Inputs shared out: first (K_local, J R, W), second (J, H, K_local R).

    Comm: forward all-reduce of the output over the axis; backward none.
    Source: Dao et al. 2022, section 3.1.
    """

    def __init__(
        self, n_inputs: int, n_outputs: int, blocks: int, axis: Axis, draw: NamedNormal, *, bias: bool
    ) -> None:
        super().__init__(n_outputs, axis, draw, bias)
        grid = monarch_grid(n_inputs, n_outputs, blocks)
        first, second = two_factors(draw, n_inputs, (grid.width, grid.n_across * grid.rank))
        self.first = sharded(first("first", (blocks, blocks * grid.rank, grid.width)), 0, axis)
        self.second = sharded(second("second", (blocks, grid.height, blocks * grid.rank)), 2, axis)

    def product(self, x_I_local: Tensor) -> Tensor:
        return self.summed(grid_product(x_I_local, self.first, self.second))
