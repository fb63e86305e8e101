"""T5's buckets: a learned number a head and bucket of distances, the far ones in ever larger buckets.

Source: Raffel et al. 2020, section 2.1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megagpt.errors import require
from megagpt.inventory.init import matrix_init
from megagpt.inventory.parameter import Parameter, Parameters
from megagpt.model.position.kind import Position, shift

if TYPE_CHECKING:
    from torch import Tensor


class T5(Position):
    """Shapes: weight (t5_buckets, H)."""

    settings = ("t5_",)
    adds = "bias"
    part = "buckets"

    def check(self) -> None:
        n_buckets, max_distance = self.model.t5_buckets, self.model.t5_max_distance
        require(
            n_buckets > 1 and max_distance > n_buckets // 2,
            f"model.t5_buckets={n_buckets} with model.t5_max_distance={max_distance}",
            "leave nothing to the buckets beyond the first half, which holds one distance each",
            f"use 2 buckets or more, and a distance above {n_buckets // 2}",
            *("model.t5_buckets", "model.t5_max_distance"),
        )

    def attention_parameters(self) -> Parameters:
        shape = (self.model.t5_buckets, self.model.n_heads)
        return {"weight": Parameter(shape, "table", matrix_init(self.model, shape[-1]), sharded=1)}

    def bias(self, weights: Mapping[str, Tensor], q_BHTK: Tensor) -> Tensor:
        import torch  # computes: what is declared is read without it

        weight, n_tokens = weights["weight"], q_BHTK.shape[2]
        distance_T = torch.arange(n_tokens - 1, -1, -1, device=weight.device)
        bias_HT = weight[self._bucket(distance_T)].t()
        return shift(bias_HT.unsqueeze(1).expand(-1, n_tokens, -1))

    def added(
        self, weights: Mapping[str, Tensor], q_BHTK: Tensor, k_BGSK: Tensor, distance_BTS: Tensor, heads: range
    ) -> Tensor:
        return weights["weight"][self._bucket(distance_BTS.clamp(min=0))].movedim(-1, 1)

    def _bucket(self, distance: Tensor) -> Tensor:
        return bucket(distance, self.model.t5_buckets, self.model.t5_max_distance)


def bucket(distance: Tensor, n_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance: half of them hold one each, the others grow as its logarithm up to max_distance.

    Shapes: distance int64, any shape → the same.
    """
    import torch  # likewise

    n_exact = n_buckets // 2
    # In float32 as published: on the edge of a bucket the rounding decides, and trained tables rely on it.
    share = torch.log(distance.clamp(min=n_exact).float() / n_exact) / math.log(max_distance / n_exact)
    far = n_exact + (share * (n_buckets - n_exact)).long()
    return torch.where(distance < n_exact, distance, far.clamp(max=n_buckets - 1))
