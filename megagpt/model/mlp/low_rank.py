"""Matrices of low rank: W = S R, with R (r, I) and S (O, r): r (I + O) parameters, over the model axis.

Only r numbers a token cross the axis where a dense layer sends its whole input or output: the factor beside the
residual stream is whole on every rank, the one beside the hidden width is shared out. The price is that r d_model
multiplications are done on every rank, and as many parameters held.
Letters: I inputs, O outputs, R rank, _local a shard over the axis, packs the 2 matrices of a gated unit, else absent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.errors import require
from megagpt.inventory.parameter import Init, Kept, Parameter, Parameters
from megagpt.model.mlp.kind import Direction, Product, Weights, factor_stds, truncated

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.parallel.axis import Axis
    from megagpt.parallel.linear import Edges


class LowRank(Product):
    """up: first (packs, R, D) whole, second (packs, F_local, R). down: first (R, F_local), second (D, R) whole.

    Comm: up: backward all-reduce over the axis of the gradient of the R numbers in the middle, so that the gradients of
    x and of `first`, which follow from it, are equal on all ranks. down: forward all-reduce of these R numbers.
    """

    settings = ("mlp_rank",)

    @property
    def rank(self) -> int:
        """mlp_rank, which check has seen."""
        assert self.model.mlp_rank is not None
        return self.model.mlp_rank

    def check(self) -> None:
        D, F, rank = self.model.d_model, self.model.ff_width, self.model.mlp_rank
        got = f"model.mlp=low_rank with model.mlp_rank={rank}"
        require(rank is not None, got, "needs mlp_rank", "give mlp_rank, such as 8", "model.mlp")
        require(
            self.rank <= min(D, F),
            f"model.mlp_rank={rank}",
            f"must be at most the smaller of d_model={D}, d_ff={F}",
            f"at {D * F // (D + F)} it has the parameters of dense",
            "model.mlp_rank",
        )

    def factors(self, direction: Direction, std: float) -> Parameters:
        D, F, rank, packed = self.model.d_model, self.model.ff_width, self.rank, self.packed
        n_inputs = D if direction == "up" else F
        first, second = (Init("normal", s) for s in factor_stds(std, n_inputs, (n_inputs, rank)))
        if direction == "up":
            return {
                "first": Parameter((*packed, rank, D), "map", first),
                "second": Parameter((*packed, F, rank), "map", second, sharded=len(packed)),
            }
        return {
            "first": Parameter((rank, F), "map", first, sharded=1),
            "second": Parameter((D, rank), "map", second),
        }

    def kept(self) -> tuple[Kept, ...]:
        return (Kept("between the factors", (self.packs + 1) * self.rank, ways=1),)

    def multiply_up(self, weights: Weights, x_I: Tensor, axis: Axis, edges: Edges) -> Tensor:
        import torch  # computes: what is declared is read without it
        import torch.nn.functional as F  # likewise

        first, second = weights["first"], weights["second"]
        z_R = edges.enter(F.linear(x_I, first.view(-1, first.shape[-1])), axis)
        seconds_OR = second.view(self.packs, -1, second.shape[-1])
        parts = [F.linear(z, second_OR) for z, second_OR in zip(z_R.chunk(self.packs, -1), seconds_OR, strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def multiply_down(self, weights: Weights, x_I_local: Tensor, axis: Axis, edges: Edges) -> Tensor:
        import torch.nn.functional as F  # likewise

        return F.linear(edges.leave(F.linear(x_I_local, weights["first"]), axis), weights["second"])

    def project(self, weight: Tensor, direction: Direction) -> dict[str, Tensor]:
        second, first = truncated(weight.double(), self.rank)
        return {"first": first, "second": second}
