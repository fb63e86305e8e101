"""What goes from layer to layer: activations, and by what the tokens are known; with room for decoding.

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from megagpt.model.cache import View


class Stream(NamedTuple):
    """A micro-batch on its way through the layers; pipeline stages hand on the first two.

    x: activations (B, T, D); before the embedding, tokens (B, T).
    sample_ids_B: positions of the samples in the run, by which dropout masks are drawn.
    cache: what the tokens before left; these attend it, and are added to it. Rows of unequal length then lie packed.
    """

    x: Tensor
    sample_ids_B: Tensor  # noqa: N815
    cache: View | None = None

    @property
    def positions_BT(self) -> Tensor | None:  # noqa: N802
        """Where the tokens stand in their texts; None: at 0 … T - 1, as in training."""
        return None if self.cache is None else self.cache.packed(self.cache.positions_BT)

    @staticmethod
    def of(inputs: Stream | tuple[Tensor, Tensor]) -> Stream:
        """From what a layer is handed: a pipeline stage passes plain tuples."""
        return inputs if isinstance(inputs, Stream) else Stream(*inputs)

    @property
    def wire(self) -> tuple[Tensor, Tensor]:
        """What goes to the next pipeline stage."""
        return self.x, self.sample_ids_B
