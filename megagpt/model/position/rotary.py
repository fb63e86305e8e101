"""Rotary positions: queries and keys turned by angles that grow with the position.

Source: Su et al. 2021 (RoFormer), section 3.4.2; Wang & Komatsuzaki 2021 (a part of the width, GPT-J's pairs of
neighbours).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.errors import require
from megagpt.model.position.kind import Position
from megagpt.model.position.scaling import scaling_of

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.config import ModelConfig


class Rotary(Position):
    """Of the width of a head the first rotary_width elements are turned."""

    settings = ("rotary_",)
    ops = ("rotary",)

    def __init__(self, model: ModelConfig, layer: int = 0) -> None:
        super().__init__(model, layer)
        # Computed from the configuration and never stored: a model in 16 bits would round buffers.
        self.tables: dict[tuple, tuple[int, Tensor, Tensor]] = {}

    def check(self) -> None:
        model, turned = self.model, self.model.rotary_width
        require(
            turned % 2 == 0 and turned > 0 and model.rotary_fraction <= 1,
            f"model.position={model.position} with heads of width {model.head_width}, "
            f"rotary_fraction={model.rotary_fraction}",
            f"must turn pairs of numbers within a head, not {turned} of {model.head_width}",
            "set d_head to an even number, rotary_fraction to at most 1",
            *("model.position", "model.rotary_fraction", "model.d_head"),
        )
        scaling_of(model).check()

    def turn(self, x_BTGXK: Tensor, positions_BT: Tensor | None, n_turned: int | None, kernels: str) -> Tensor:
        from megagpt.ops.rotary import rotary  # computes: what is declared is read without torch

        cos_SR, sin_SR = self._tables_like(x_BTGXK, positions_BT)
        if positions_BT is None:
            cos_SR, sin_SR = cos_SR[: x_BTGXK.shape[1]], sin_SR[: x_BTGXK.shape[1]]
        return rotary(
            x_BTGXK,
            cos_SR,
            sin_SR,
            positions_BT=positions_BT,
            n_rotated_heads=n_turned,
            interleaved=self.model.rotary_interleaved,
            kernels=kernels,
        )

    def _tables_like(self, x_BTGXK: Tensor, positions_BT: Tensor | None) -> tuple[Tensor, Tensor]:
        import torch  # likewise

        from megagpt.ops.rotary import rotary_tables  # likewise

        scaling, n_positions = scaling_of(self.model), x_BTGXK.shape[1]
        if positions_BT is not None and self.model.rotary_scaling == "dynamic":  # else nobody waits for a GPU's answer
            n_positions = int(positions_BT.max()) + 1
        length, dtype = scaling.length(n_positions), torch.float64 if x_BTGXK.dtype == torch.float64 else torch.float32
        made_for, *tables = self.tables.get((x_BTGXK.device, dtype), (None,))
        if made_for != length:
            frequency_R, magnitude = scaling.frequencies(length), scaling.magnitude
            tables = rotary_tables(self.model.seq_len, frequency_R, magnitude, device=x_BTGXK.device, dtype=dtype)
            self.tables[x_BTGXK.device, dtype] = (length, *tables)
        cos_SR, sin_SR = tables
        return cos_SR, sin_SR
