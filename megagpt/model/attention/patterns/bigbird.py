"""Blocks of keys: the last ones, the first ones, and random ones between (Zaheer et al. 2020, section 2)."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from megagpt.model.attention.patterns.kind import PatternRule, triangle

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megagpt.model.attention.patterns.kind import Predicate


class BigBird(PatternRule):
    """B W G R, in blocks of B positions: the query's block and the W - 1 before it, the first G, and R others between
    these, drawn by layer and block.
    """

    form = "bigbird:B:W:G:R"
    n_numbers, n_positive = 4, 2  # there may be no first and no random blocks
    needs_mask = True

    @property
    def reach(self) -> int:
        return self.numbers[0] * sum(self.numbers[1:])

    def attended_pairs(self, seq_len: int) -> int:
        """Block b attends min(b, W + G + R - 1) blocks before it, and its own causally."""
        block, window, first, random = self.numbers
        blocks, rest = divmod(seq_len, block)
        most = window + first + random - 1
        growing = min(blocks, most)
        before = triangle(growing - 1) + (blocks - growing) * most
        return block * block * before + rest * block * min(blocks, most) + blocks * triangle(block) + triangle(rest)

    def predicate(self, layer: int, seq_len: int, device: torch.device) -> Predicate:
        size, n_last, n_first, n_random = self.numbers
        random_NN = random_blocks(layer, -(-seq_len // size), n_last, n_first, n_random).to(device)

        def attends(q: Tensor, k: Tensor) -> Tensor:
            query, key = q // size, k // size
            return (k <= q) & ((query - key < n_last) | (key < n_first) | random_NN[query, key])

        return attends


def random_blocks(layer: int, n_blocks: int, n_last: int, n_first: int, n_random: int) -> Tensor:
    """The random blocks: of each block of queries n_random of those between the first and the last ones.

    A row is a function of (layer, row): neither the run's seed nor the length of the sequence plays a part, so that a
    model that was trained sees at any length what it saw.
    Shapes: → random_NN bool, query blocks by key blocks.
    """
    import torch  # computes: what is declared is read without it

    random_NN = torch.zeros(n_blocks, n_blocks, dtype=torch.bool, device="cpu")
    for row in range(n_last + n_first, n_blocks):
        digest = hashlib.sha256(f"bigbird/{layer}/{row}".encode()).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        n_between = row - n_last + 1 - n_first
        chosen = torch.randperm(n_between, generator=generator, device="cpu")[:n_random]
        random_NN[row, n_first + chosen] = True
    return random_NN
