"""What goes from layer to layer: activations, and by what the tokens are known; with room for decoding.

Shapes: B batch, T time, D model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from megagpt.model.documents import Documents

if TYPE_CHECKING:
    from megagpt.model.cache import View


class Stream(NamedTuple):
    """A micro-batch on its way through the layers; pipeline stages hand on what `wire` says.

    x: activations (B, T, D); before the embedding, tokens (B, T).
    sample_ids_B: positions of the samples in the run, by which dropout masks are drawn.
    cache: what the tokens before left; these attend it, and are added to it. Rows of unequal length then lie packed.
    documents: those of each row, where it holds several that do not see each other.
    """

    x: Tensor
    sample_ids_B: Tensor  # noqa: N815
    cache: View | None = None
    documents: Documents | None = None

    @property
    def positions_BT(self) -> Tensor | None:  # noqa: N802
        """Where the tokens stand in their texts; None: at 0 … T - 1, as in pretraining."""
        if self.documents is not None:
            return self.documents.positions_BT
        return None if self.cache is None else self.cache.packed(self.cache.positions_BT)

    @staticmethod
    def of(inputs: Stream | tuple[Tensor, ...]) -> Stream:
        """From what a layer is handed: a pipeline stage passes plain tuples, as `wire` has them."""
        if isinstance(inputs, Stream):
            return inputs
        x, sample_ids_B, *positions = inputs
        return Stream(x, sample_ids_B, documents=Documents(*positions) if positions else None)

    @property
    def wire(self) -> tuple[Tensor, ...]:
        """What goes to the next pipeline stage: with the positions within documents where rows hold several."""
        positions = () if self.documents is None else (self.documents.positions_BT,)
        return self.x, self.sample_ids_B, *positions


def holds_documents(inputs: Stream | tuple[Tensor, ...]) -> bool:
    """Whether what a layer is handed is rows of several documents."""
    return inputs.documents is not None if isinstance(inputs, Stream) else len(inputs) == 3
