"""What goes from layer to layer: activations, and by what the tokens are known; with room for decoding.

Shapes: B batch, T time, D model, S keys so far.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Cache:
    """Keys and values of the tokens before, by layer: what decoding attends beside its own tokens."""

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def extend(self, layer: int, k_BGTK: Tensor, v_BGTK: Tensor, positions_BT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add these; returns all keys, values and positions of the layer so far: (B, G, S, K) twice, (B, S)."""
        if layer in self.layers:
            k_before, v_before, positions_before = self.layers[layer]
            k_BGTK, v_BGTK = torch.cat((k_before, k_BGTK), dim=2), torch.cat((v_before, v_BGTK), dim=2)
            positions_BT = torch.cat((positions_before, positions_BT), dim=1)
        self.layers[layer] = k_BGTK, v_BGTK, positions_BT
        return self.layers[layer]


class Stream(NamedTuple):
    """A micro-batch on its way through the layers; pipeline stages hand on the first two.

    x: activations (B, T, D); before the embedding, tokens (B, T).
    sample_ids_B: positions of the samples in the run, by which dropout masks are drawn.
    positions_BT: where the tokens stand in their texts; None: at 0 … T - 1, as in training.
    cache: with positions, what the tokens before left; they attend it, and are added to it.
    """

    x: Tensor
    sample_ids_B: Tensor  # noqa: N815
    positions_BT: Tensor | None = None  # noqa: N815
    cache: Cache | None = None

    @staticmethod
    def of(inputs: Stream | tuple[Tensor, Tensor]) -> Stream:
        """From what a layer is handed: a pipeline stage passes plain tuples."""
        return inputs if isinstance(inputs, Stream) else Stream(*inputs)

    @property
    def wire(self) -> tuple[Tensor, Tensor]:
        """What goes to the next pipeline stage."""
        return self.x, self.sample_ids_B
