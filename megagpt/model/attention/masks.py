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
    from megagpt.model.attention.patterns import Predicate
    from megagpt.model.documents import Documents


class Masks:
    """The masks of one layer, for any sequence up to seq_len."""

    def __init__(self, pattern: Pattern, layer: int, seq_len: int) -> None:
        self.pattern, self.rule, self.layer, self.seq_len = pattern, pattern.rule, layer, seq_len
        self.predicates: dict[torch.device, Predicate] = {}  # one may draw blocks, which decoding needs at each token
        self.kept_dense: tuple[int, torch.device, Tensor] | None = None
        self.kept_blocks: tuple[int, torch.device, BlockMask] | None = None

    def dense(self, T: int, device: torch.device, documents: Documents | None = None) -> Tensor:
        """Shapes: → (1, 1, T, T) bool, queries by keys, causality included; (B, 1, T, T) of documents in B rows."""
        if documents is not None:
            return documents.kept(("dense", *self._kind), lambda: self._within(documents))
        kept = self.kept_dense
        if kept is None or kept[:2] != (T, device):
            positions_T = torch.arange(T, device=device)
            self.kept_dense = kept = (T, device, self.between(positions_T, positions_T)[None, None])
        return kept[2]

    def blocks(self, T: int, device: torch.device, documents: Documents | None = None) -> BlockMask:
        """FlexAttention's mask, which knows the blocks that it can skip; those of documents in rows too."""
        if documents is not None:
            return documents.kept(("blocks", *self._kind), lambda: self._blocks_within(documents))
        kept = self.kept_blocks
        if kept is None or kept[:2] != (T, device):
            predicate = self._predicate(device)
            mask = create_block_mask(lambda b, h, q, k: predicate(q, k), None, None, T, T, device=str(device))
            self.kept_blocks = kept = (T, device, mask)
        return kept[2]

    def between(self, queries: Tensor, keys: Tensor) -> Tensor:
        """For queries and keys at any positions.  Shapes: (…, T) and (…, S) int64 → (…, T, S) bool."""
        return self._predicate(queries.device)(queries.unsqueeze(-1), keys.unsqueeze(-2))

    @property
    def _kind(self) -> tuple[Pattern, int | None]:
        """What layers have in common whose masks are the same."""
        return self.pattern, self.layer if self.rule.differs else None

    def _within(self, documents: Documents) -> Tensor:
        """Keys of the query's own document, by their places in it.  Shapes: → (B, 1, T, T)."""
        numbers_BT, positions_BT = documents.numbers_BT, documents.positions_BT
        same_BTT = numbers_BT.unsqueeze(-1) == numbers_BT.unsqueeze(-2)
        return (self.between(positions_BT, positions_BT) & same_BTT).unsqueeze(1)

    def _blocks_within(self, documents: Documents) -> BlockMask:
        numbers_BT, positions_BT = documents.numbers_BT, documents.positions_BT
        predicate, (B, T) = self._predicate(positions_BT.device), positions_BT.shape

        def sees(b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            same = numbers_BT[b, q] == numbers_BT[b, k]
            return predicate(positions_BT[b, q], positions_BT[b, k]) & same

        return create_block_mask(sees, B, None, T, T, device=str(positions_BT.device))

    def _predicate(self, device: torch.device) -> Predicate:
        if device not in self.predicates:
            self.predicates[device] = self.rule.predicate(self.layer, self.seq_len, device)
        return self.predicates[device]
