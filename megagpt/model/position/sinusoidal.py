"""Fixed positions, added to the embedding: sine and cosine of neighbouring elements, at growing wavelengths.

Source: Vaswani et al. 2017, section 3.5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.model.position.kind import Position

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.config import ModelConfig


class Sinusoids:
    """The table, computed and never stored: as a buffer of a model in 16 bits it would be rounded."""

    def __init__(self, seq_len: int, d_model: int) -> None:
        self.shape = (seq_len, d_model)
        self.tables: dict[tuple, Tensor] = {}

    def like(self, x: Tensor) -> Tensor:
        """Shapes: → (seq_len, D), with x's dtype and device."""
        import torch  # computes: what is declared is read without it

        from megagpt.ops.rotary import rotary_frequencies, rotary_tables  # likewise

        key = (x.device, x.dtype)
        if key not in self.tables:
            seq_len, width = self.shape
            cos_TR, sin_TR = rotary_tables(seq_len, rotary_frequencies(width + width % 2), dtype=torch.float64)
            self.tables[key] = torch.stack((sin_TR, cos_TR), dim=-1).flatten(1)[:, :width].to(*key)
        return self.tables[key]


class Sinusoidal(Position):
    """No parameters."""

    def __init__(self, model: ModelConfig, layer: int = 0) -> None:
        super().__init__(model, layer)
        self.sinusoids = Sinusoids(model.seq_len, model.d_model)

    def embed(self, x_BTD: Tensor, positions_BT: Tensor | None, table: Tensor | None) -> Tensor:
        table_TD = self.sinusoids.like(x_BTD)
        return x_BTD + (table_TD[: x_BTD.shape[1]] if positions_BT is None else table_TD[positions_BT])
