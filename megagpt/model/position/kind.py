"""What a kind of position declares, and where it takes part in the arithmetic.

A kind is one file beside this one (its settings' checks, what it declares, how it computes) and a line of POSITIONS.
Torch is imported where it computes, so that a plan reads what it declares without it.

Shapes: B batch, T queries, S keys, D model, H this rank's heads, G its heads of keys and values, K head width, X what
is packed side by side within a head: [q, k, v], [q] or [k, v].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from megagpt.inventory.parameter import Kept, Parameters
from megagpt.model.attention.grouped import grouped_scores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megagpt.config import ModelConfig


class Position:
    """No position information, in one layer of one model; kinds override what they have.

    settings: how the names of the settings that it reads begin.
    adds: what it adds to attention's scores, which not every implementation has a place for: "slopes" times the
    distance; a learned "bias"; or "relative", where it computes the scores itself.
    part: the name of its parameters within attention; "" where it has none there.
    score_products: products of T x T x K that a head takes, that of the probabilities with the values included.
    ops: those of megagpt/ops that it calls.
    period: after how many layers what it declares repeats itself.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    adds: ClassVar[Literal["slopes", "bias", "relative"] | None] = None
    part: ClassVar[str] = ""
    score_products: ClassVar[int] = 2
    ops: ClassVar[tuple[str, ...]] = ()
    period: ClassVar[int] = 1

    def __init__(self, model: ModelConfig, layer: int = 0) -> None:
        self.model, self.layer = model, layer

    def check(self) -> None:
        """Raises UserError for settings that do not fit together."""

    def embedding_parameters(self) -> Parameters:
        """What it learns beside the token embedding."""
        return {}

    def attention_parameters(self) -> Parameters:
        """What it learns in each attention."""
        return {}

    def kept(self) -> tuple[Kept, ...]:
        """What the backward pass keeps for it in each attention."""
        return ()

    def embed(self, x_BTD: Tensor, positions_BT: Tensor | None, table: Tensor | None) -> Tensor:
        """The embedded tokens with their positions (None: 0 … T - 1). table: `embedding_parameters`' "positions"."""
        return x_BTD

    def turn(self, x_BTGXK: Tensor, positions_BT: Tensor | None, n_turned: int | None, kernels: str) -> Tensor:
        """Queries and keys with their positions: the first n_turned of X (None: all but the last, the values)."""
        return x_BTGXK

    def slopes(self, heads: range, device: torch.device) -> Tensor | None:
        """What scores lose for each token of distance; None where they lose nothing.  Shapes: → (H) float32."""
        return None

    def scores(self, weights: Mapping[str, Tensor], q_BHTK: Tensor, k_BGTK: Tensor) -> Tensor:
        """q kᵀ, not yet divided by √K, of queries and keys at 0 … T - 1; with positions where these are "relative".

        Shapes: → (B, H, T, T), right where k <= q.
        """
        return grouped_scores(q_BHTK, k_BGTK)

    def bias(self, weights: Mapping[str, Tensor], q_BHTK: Tensor) -> Tensor:
        """What is added to the scaled scores of queries and keys at 0 … T - 1, where it is a "bias".

        Shapes: → broadcasts to (H, T, T), right where k <= q.
        """
        return q_BHTK.new_zeros(())

    def added(
        self, weights: Mapping[str, Tensor], q_BHTK: Tensor, k_BGSK: Tensor, distance_BTS: Tensor, heads: range
    ) -> Tensor:
        """What is added to q kᵀ / √K where queries and keys lie anywhere: distances are of positions, query - key.

        heads: which of all heads these are.
        Shapes: → broadcasts to (B, H, T, S), right where the distance is not negative.
        """
        return q_BHTK.new_zeros(())


def shift(x_TT: Tensor) -> Tensor:
    """From columns that are distances, T - 1 … 0, to columns that are keys; what is ahead of a query is arbitrary.

    Row i must move left by T - 1 - i. With a column more, the rows of the flat array are one longer than those that it
    is cut into again, and each begins one element later than the last one.
    Shapes: (…, T, T) → (…, T, T).  Source: Dai et al. 2019, appendix B.
    """
    import torch.nn.functional as F  # computes: what is declared is read without torch

    T = x_TT.shape[-1]
    return F.pad(x_TT, (1, 0)).flatten(-2)[..., T:].unflatten(-1, (T, T))
