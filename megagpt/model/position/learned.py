"""A learned vector a position, added to the embedding (Radford et al. 2018, section 4.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.inventory.init import embedding_init
from megagpt.inventory.parameter import Parameter, Parameters
from megagpt.model.position.kind import Position

if TYPE_CHECKING:
    from torch import Tensor


class Learned(Position):
    """Shapes: positions (T, D)."""

    def embedding_parameters(self) -> Parameters:
        model = self.model
        return {"positions": Parameter((model.seq_len, model.d_model), "table", embedding_init(model))}

    def embed(self, x_BTD: Tensor, positions_BT: Tensor | None, table: Tensor | None) -> Tensor:
        assert table is not None
        return x_BTD + (table[: x_BTD.shape[1]] if positions_BT is None else table[positions_BT])
