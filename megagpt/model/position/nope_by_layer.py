"""Rotary positions in three layers of four, and none in the fourth, which reaches further than was trained.

Source: Yang et al. 2025 (RoPE to NoPE and back again), section 4; SmolLM3 and Llama 4 have the same period.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.model.position.rotary import Rotary

if TYPE_CHECKING:
    from torch import Tensor


class NopeByLayer(Rotary):
    """With the settings of rotary."""

    period = 4

    def turn(self, x_BTGXK: Tensor, positions_BT: Tensor | None, n_turned: int | None, kernels: str) -> Tensor:
        if self.layer % self.period == self.period - 1:
            return x_BTGXK
        return super().turn(x_BTGXK, positions_BT, n_turned, kernels)
