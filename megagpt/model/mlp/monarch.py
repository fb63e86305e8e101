"""Monarch matrices (Dao et al. 2022): two block-diagonal factors with a permutation between, over the model axis.

Seen as a whole, W is a grid of b x b blocks, and the block in row j and column k is a product of its own, of R columns
of second[j] and R rows of first[k]: R = ceil(min(I, O) / b²), 1 where b² is the width, as in the paper: b R (I + O)
parameters. A rank of the axis holds rows of the grid (up) or columns (down), so that nothing is done twice and nothing
more is sent than by a dense layer. The paper's last permutation only renames outputs, and is left out: a part of them
is whole blocks then.
Letters: N tokens, K blocks across, J blocks down, W width and H height of a block (I = K W, O = J H), R its rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.errors import divisors, require
from megagpt.inventory.parameter import Init, Kept, Parameter, Parameters
from megagpt.model.mlp.kind import Direction, Product, Weights, factor_stds, grid_product, truncated

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.parallel.axis import Axis
    from megagpt.parallel.linear import Edges


@dataclass(frozen=True)
class Grid:
    """A matrix as a grid of blocks: `blocks` rows of as many, each `height` x `width` and of rank `rank`."""

    blocks: int
    height: int
    width: int
    rank: int

    @property
    def middle(self) -> int:
        """Numbers between the two factors."""
        return self.blocks * self.blocks * self.rank


def monarch_grid(n_inputs: int, n_outputs: int, blocks: int) -> Grid:
    """The middle is as wide as the narrower side, rounded up to a multiple of blocks²."""
    rank = -(-min(n_inputs, n_outputs) // blocks**2)
    return Grid(blocks, n_outputs // blocks, n_inputs // blocks, rank)


class Monarch(Product):
    """up: first (packs, K, J_local R, W), second (packs, J_local, H, K R). down: first (K_local, J R, W), second (J, H,
    K_local R).

    Comm: up: `edges.enter` of x. down: `edges.leave` of the output.
    Source: Dao et al. 2022, section 3.1.
    """

    settings = ("mlp_blocks",)

    @property
    def blocks(self) -> int:
        """mlp_blocks, which check has seen."""
        assert self.model.mlp_blocks is not None
        return self.model.mlp_blocks

    def grid(self, direction: Direction) -> Grid:
        """Of either matrix."""
        D, F = self.model.d_model, self.model.ff_width
        n_inputs, n_outputs = (D, F) if direction == "up" else (F, D)
        return monarch_grid(n_inputs, n_outputs, self.blocks)

    def check(self) -> None:
        D, F, blocks = self.model.d_model, self.model.ff_width, self.model.mlp_blocks
        got = f"model.mlp=monarch with model.mlp_blocks={blocks}"
        require(blocks is not None, got, "needs mlp_blocks", "give mlp_blocks, such as 8", "model.mlp")
        require(
            D % self.blocks == 0 and F % self.blocks == 0,
            f"model.mlp_blocks={blocks}",
            f"must divide d_model={D}, d_ff={F}",
            f"try {', '.join(str(n) for n in divisors(D) if F % n == 0)}",
            "model.mlp_blocks",
        )

    def check_tp(self, tp: int) -> None:
        super().check_tp(tp)
        choices = ", ".join(map(str, divisors(self.blocks)))
        wanted, keys = f"must divide mlp_blocks={self.blocks}", ("parallel.tp", "model.mlp_blocks")
        require(self.blocks % tp == 0, f"parallel.tp={tp}", wanted, f"try {choices}", *keys)

    def factors(self, direction: Direction, std: float) -> Parameters:
        b, grid = self.blocks, self.grid(direction)
        packed, cuts = (self.packed, (1, 0)) if direction == "up" else ((), (0, 2))
        stds = factor_stds(std, b * grid.width, (grid.width, b * grid.rank))
        first, second = (*packed, b, b * grid.rank, grid.width), (*packed, b, grid.height, b * grid.rank)
        return {
            name: Parameter(shape, "map", Init("normal", s), sharded=len(packed) + cut)
            for name, shape, s, cut in zip(("first", "second"), (first, second), stds, cuts, strict=True)
        }

    def kept(self) -> tuple[Kept, ...]:
        return (Kept("between the factors", (self.packs + 1) * self.grid("up").middle),)

    def multiply_up(self, weights: Weights, x_I: Tensor, axis: Axis, edges: Edges) -> Tensor:
        first, second = weights["first"], weights["second"]
        if self.packs > 1:  # the grids of a gated unit are one, twice as high
            first, second = first.transpose(0, 1).flatten(1, 2), second.flatten(0, 1)
        return grid_product(edges.enter(x_I, axis), first, second)

    def multiply_down(self, weights: Weights, x_I_local: Tensor, axis: Axis, edges: Edges) -> Tensor:
        return edges.leave(grid_product(x_I_local, weights["first"], weights["second"]), axis)

    def project(self, weight: Tensor, direction: Direction) -> dict[str, Tensor]:
        """Each block of the grid by itself. Source: Dao et al. 2022, section 3.3, algorithm 1."""
        import torch  # computes: what is declared is read without it

        grid, firsts, seconds = self.grid(direction), [], []
        for row_HI in weight.view(grid.blocks, grid.height, -1):  # a row at a time: float64 takes room
            blocks_KHW = row_HI.view(grid.height, grid.blocks, -1).transpose(0, 1).double()
            left_KHR, right_KRW = truncated(blocks_KHW, grid.rank)
            firsts.append(right_KRW)
            seconds.append(left_KHR.transpose(0, 1).flatten(1))
        return {"first": torch.cat(firsts, dim=1), "second": torch.stack(seconds)}
