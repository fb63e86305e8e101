"""Which keys a query attends: one predicate on positions, and the masks that each implementation wants, made from it.

Shapes: T time, N blocks of BigBird.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from megagpt.config.pattern import Pattern

# (query positions, key positions) -> whether the one attends the other, of their broadcast shape
Predicate = Callable[[Tensor, Tensor], Tensor]


class Masks:
    """The masks of one layer, for any sequence up to seq_len; those of the last length are kept.

    Source: see `Pattern`.
    """

    def __init__(self, pattern: Pattern, layer: int, seq_len: int) -> None:
        self.pattern, self.layer, self.seq_len = pattern, layer, seq_len
        self.kept_dense: tuple[int, torch.device, Tensor] | None = None
        self.kept_blocks: tuple[int, torch.device, BlockMask] | None = None

    @property
    def window(self) -> int | None:
        """How far back a query sees, its own position counted, where that says it all beside causality."""
        return self.pattern.numbers[0] if self.pattern.kind == "window" else None

    @property
    def needed(self) -> bool:
        """Whether it takes a mask beside causality and a window."""
        return self.pattern.kind in ("strided", "bigbird")

    def dense(self, T: int, device: torch.device) -> Tensor:
        """Shapes: → (1, 1, T, T) bool, queries by keys, causality included."""
        kept = self.kept_dense
        if kept is None or kept[:2] != (T, device):
            positions_T = torch.arange(T, device=device)
            mask_TT = self.predicate(device)(positions_T.unsqueeze(1), positions_T)
            self.kept_dense = kept = (T, device, mask_TT[None, None])
        return kept[2]

    def blocks(self, T: int, device: torch.device) -> BlockMask:
        """FlexAttention's mask, which knows the blocks that it can skip."""
        kept = self.kept_blocks
        if kept is None or kept[:2] != (T, device):
            predicate = self.predicate(device)
            mask = create_block_mask(lambda b, h, q, k: predicate(q, k), None, None, T, T, device=str(device))
            self.kept_blocks = kept = (T, device, mask)
        return kept[2]

    def predicate(self, device: torch.device) -> Predicate:
        """The pattern as a function of positions on this device."""
        kind, numbers = self.pattern.kind, self.pattern.numbers
        if kind == "dense":
            return lambda q, k: k <= q
        if kind == "window":
            (width,) = numbers
            return lambda q, k: (k <= q) & (q - k < width)
        if kind == "strided":
            (stride,) = numbers
            return lambda q, k: (k <= q) & ((q - k < stride) | ((q - k) % stride == 0))
        size, n_last, n_first, n_random = numbers
        n_blocks = -(-self.seq_len // size)
        random_NN = random_blocks(self.layer, n_blocks, n_last, n_first, n_random).to(device)

        def bigbird(q: Tensor, k: Tensor) -> Tensor:
            query, key = q // size, k // size
            return (k <= q) & ((query - key < n_last) | (key < n_first) | random_NN[query, key])

        return bigbird


def random_blocks(layer: int, n_blocks: int, n_last: int, n_first: int, n_random: int) -> Tensor:
    """BigBird's random blocks: of each block of queries n_random of those between the first and the last ones.

    A row is a function of (layer, row): neither the run's seed nor the length of the sequence plays a part, so that a
    model that was trained sees at any length what it saw.
    Shapes: → random_NN bool, query blocks by key blocks.
    """
    random_NN = torch.zeros(n_blocks, n_blocks, dtype=torch.bool, device="cpu")
    for row in range(n_last + n_first, n_blocks):
        digest = hashlib.sha256(f"bigbird/{layer}/{row}".encode()).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        n_between = row - n_last + 1 - n_first
        chosen = torch.randperm(n_between, generator=generator, device="cpu")[:n_random]
        random_NN[row, n_first + chosen] = True
    return random_NN
