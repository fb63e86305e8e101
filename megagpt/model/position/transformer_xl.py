"""Transformer-XL: scores (q_i + u) · k_j + (q_i + v) · W r_{i-j}, r a sinusoid of the distance; u, v, W are learned.

Source: Dai et al. 2019, section 3.3 and appendix B (the shift).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from megagpt.inventory.init import matrix_init
from megagpt.inventory.parameter import Kept, Parameter, Parameters
from megagpt.model.attention.grouped import grouped_scores
from megagpt.model.position.kind import Position, shift
from megagpt.model.position.sinusoidal import Sinusoids

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.config import ModelConfig


class TransformerXL(Position):
    """Shapes: weight W (H * K, D), content_bias u (H, K), position_bias v (H, K).

    Comm: none: r is the same on all ranks and has no gradient.
    """

    adds = "relative"
    part = "relative"
    score_products = 3

    def __init__(self, model: ModelConfig, layer: int = 0) -> None:
        super().__init__(model, layer)
        self.sinusoids = Sinusoids(model.seq_len, model.d_model)

    def attention_parameters(self) -> Parameters:
        model = self.model
        per_head, D = (model.n_heads, model.head_width), model.d_model
        # The projection of the T positions is done once for all sequences of a micro-batch: no FLOPs of a token.
        weight = Parameter((math.prod(per_head), D), "map", matrix_init(model, D), sharded=0, flops=0)
        of_head = Parameter(per_head, "vector", matrix_init(model, per_head[-1]), sharded=0)
        return {"weight": weight, "content_bias": of_head, "position_bias": of_head}

    def kept(self) -> tuple[Kept, ...]:
        width = self.model.n_heads * self.model.head_width
        return (
            Kept("queries with either bias", 2 * width),
            Kept("positions and their projection", self.model.d_model, ways=1, once=True),
        )

    def scores(self, weights: Mapping[str, Tensor], q_BHTK: Tensor, k_BGTK: Tensor) -> Tensor:
        r_TD = self.sinusoids.like(q_BHTK)[: q_BHTK.shape[2]].flip(0)  # of the distances T - 1 … 0
        by_distance_BHTT = self._by_distance(weights, q_BHTK, r_TD)
        return grouped_scores(q_BHTK + weights["content_bias"].unsqueeze(1), k_BGTK) + shift(by_distance_BHTT)

    def added(
        self, weights: Mapping[str, Tensor], q_BHTK: Tensor, k_BGSK: Tensor, distance_BTS: Tensor, heads: range
    ) -> Tensor:
        by_distance_BHTL = self._by_distance(weights, q_BHTK, self.sinusoids.like(q_BHTK))
        u_BHTK = weights["content_bias"].unsqueeze(1).expand_as(q_BHTK)
        places_BHTS = distance_BTS.clamp(min=0).unsqueeze(1).expand(-1, q_BHTK.shape[1], -1, -1)
        added_BHTS = grouped_scores(u_BHTK, k_BGSK) + by_distance_BHTL.gather(-1, places_BHTS)
        return added_BHTS / math.sqrt(self.model.head_width)

    def _by_distance(self, weights: Mapping[str, Tensor], q_BHTK: Tensor, r_LD: Tensor) -> Tensor:
        """Shapes: → (B, H, T, L)."""
        v_HK = weights["position_bias"]
        r_HLK = (r_LD @ weights["weight"].t()).unflatten(-1, v_HK.shape).transpose(0, 1)
        return (q_BHTK + v_HK.unsqueeze(1)) @ r_HLK.transpose(-2, -1)
