"""The masks of a layer's pattern, as each implementation of attention wants them; those of the last call are kept.

Shapes: T queries, S keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

if TYPE_CHECKING:
    from megagpt.config.pattern import Pattern

if TYPE_CHECKING:
    from megagpt.model.attention.patterns import Predicate


class Masks:
    """The masks of one layer, for any sequence up to seq_len."""

    def __init__(self, pattern: Pattern, layer: int, seq_len: int) -> None:
        self.pattern, self.rule, self.layer, self.seq_len = pattern, pattern.rule, layer, seq_len
        self.predicates: dict[torch.device, Predicate] = {}  # one may draw blocks, which decoding needs at each token
        self.kept_dense: tuple[int, torch.device, Tensor] | None = None
        self.kept_blocks: tuple[int, torch.device, BlockMask] | None = None

    def dense(self, T: int, device: torch.device) -> Tensor:
        """Shapes: → (1, 1, T, T) bool, queries by keys, causality included."""
        kept = self.kept_dense
        if kept is None or kept[:2] != (T, device):
            positions_T = torch.arange(T, device=device)
            self.kept_dense = kept = (T, device, self.between(positions_T, positions_T)[None, None])
        return kept[2]

    def blocks(self, T: int, device: torch.device) -> BlockMask:
        """FlexAttention's mask, which knows the blocks that it can skip."""
        kept = self.kept_blocks
        if kept is None or kept[:2] != (T, device):
            predicate = self._predicate(device)
            mask = create_block_mask(lambda b, h, q, k: predicate(q, k), None, None, T, T, device=str(device))
            self.kept_blocks = kept = (T, device, mask)
        return kept[2]

    def between(self, queries: Tensor, keys: Tensor) -> Tensor:
        """For queries and keys at any positions.  Shapes: (…, T) and (…, S) int64 → (…, T, S) bool."""
        return self._predicate(queries.device)(queries.unsqueeze(-1), keys.unsqueeze(-2))

    def _predicate(self, device: torch.device) -> Predicate:
        if device not in self.predicates:
            self.predicates[device] = self.rule.predicate(self.layer, self.seq_len, device)
        return self.predicates[device]
