"""What a kind of position says of itself, and where it takes part in the arithmetic.

A kind is one file beside this one: its settings' checks, what it declares, and how it computes. Torch is imported where
it computes, so that a plan reads what it declares on a machine without it. `__init__.py` lists the kinds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from megagpt.inventory.parameter import Kept, Parameters

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megagpt.config import ModelConfig


class Position:
    """No position information, in one layer of one model; kinds override what they have.

    settings: how the names of the settings begin that play a part.  adds: what it adds to attention's scores, which
    not every attention has a place for: "slopes" times the distance, a "bias" of each head, or all that is "relative".
    part: the name that its parameters have within attention.  score_products: products of queries with T keys, that of
    the probabilities with the values included.  ops: of megagpt/ops that it calls.  period: after how many layers it
    repeats itself.
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
        """The embedded tokens with their positions (None: 0 … T - 1). table: its parameter there, if it has one."""
        return x_BTD

    def turn(self, x_BTGXK: Tensor, positions_BT: Tensor | None, n_turned: int | None, kernels: str) -> Tensor:
        """Queries and keys with their positions: of the X heads of a group the first n_turned (None: all but one)."""
        return x_BTGXK

    def slopes(self, heads: range, device: torch.device) -> Tensor | None:
        """What scores lose for each token of distance.  Shapes: → (H) float32."""
        return None

    def bias(self, weights: Mapping[str, Tensor], n_tokens: int) -> Tensor:
        """What is added to the scores of n_tokens queries and keys.  Shapes: → (H, T, T), right where k <= q."""
        raise NotImplementedError

    def relative(self, weights: Mapping[str, Tensor], q_BHTK: Tensor, k_BGTK: Tensor) -> Tensor:
        """The scores themselves, of queries and keys at 0 … T - 1.  Shapes: → (B, H, T, T), right where k <= q."""
        raise NotImplementedError

    def added(
        self, weights: Mapping[str, Tensor], q_BHTK: Tensor, k_BGSK: Tensor, distance_BTS: Tensor, heads: range
    ) -> Tensor:
        """What is added to the scaled scores of queries and keys that lie anywhere: the distance is query - key.

        Shapes: → broadcasts to (B, H, T, S), right where the distance is not negative.
        """
        raise NotImplementedError
