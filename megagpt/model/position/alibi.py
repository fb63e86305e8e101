"""ALiBi: scores lose a slope of their head times the distance (Press et al. 2022, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megagpt.model.position.kind import Position

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megagpt.config import ModelConfig


class Alibi(Position):
    """No parameters."""

    adds = "slopes"

    def __init__(self, model: ModelConfig, layer: int = 0) -> None:
        super().__init__(model, layer)
        self.kept_slopes: dict[tuple[range, torch.device], Tensor] = {}

    def slopes(self, heads: range, device: torch.device) -> Tensor | None:
        from megagpt.ops.softmax import alibi_slopes  # computes: what is declared is read without torch

        if (heads, device) not in self.kept_slopes:
            self.kept_slopes[heads, device] = alibi_slopes(self.model.n_heads)[heads.start : heads.stop].to(device)
        return self.kept_slopes[heads, device]

    def added(
        self, weights: Mapping[str, Tensor], q_BHTK: Tensor, k_BGSK: Tensor, distance_BTS: Tensor, heads: range
    ) -> Tensor:
        slopes_H = self.slopes(heads, q_BHTK.device)
        assert slopes_H is not None
        return -slopes_H[:, None, None] * distance_BTS.unsqueeze(1)
