"""Which keys a query may attend beside causality: a kind of pattern is a class here, and a line of PATTERNS. No torch.

Dense attention is the plain case.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    Predicate = Callable[[Tensor, Tensor], Tensor]


class PatternRule:
    """Dense: a query at position t attends all keys s <= t; kinds override what differs.

    form: as it is written.  n_numbers: numbers in it, of which the first n_positive must be above 0.
    needs_mask: whether it takes a mask beside causality and a window.
    differs: whether layers differ in it.
    """

    form: ClassVar[str] = "dense"
    n_numbers: ClassVar[int] = 0
    n_positive: ClassVar[int] = 0
    needs_mask: ClassVar[bool] = False
    differs: ClassVar[bool] = False

    def __init__(self, numbers: tuple[int, ...] = ()) -> None:
        self.numbers = numbers

    @property
    def reach(self) -> int:
        """Tokens that a context must have for the pattern to make sense."""
        return self.numbers[0] if self.numbers else 0

    @property
    def window(self) -> int | None:
        """How far back a query sees, its own position counted, where that says it all beside causality."""
        return None

    def attended_pairs(self, seq_len: int) -> int:
        """Pairs of a query and a key that it may attend, itself included, in a sample of seq_len tokens."""
        return triangle(seq_len)

    def predicate(self, layer: int, seq_len: int, device: torch.device) -> Predicate:
        """Whether queries at positions q attend keys at positions k: bool of their broadcast shape."""
        return lambda q, k: k <= q


class Window(PatternRule):
    """A query at t attends s with t - s < W.  Source: Beltagy et al. 2020, section 3.1; Jiang et al. 2023 (Mistral)."""

    form = "window:W"
    n_numbers = n_positive = 1

    @property
    def window(self) -> int | None:
        return self.numbers[0]

    def attended_pairs(self, seq_len: int) -> int:
        return window_pairs(self.numbers[0], seq_len)

    def predicate(self, layer: int, seq_len: int, device: torch.device) -> Predicate:
        (width,) = self.numbers
        return lambda q, k: (k <= q) & (q - k < width)


class Strided(PatternRule):
    """A query at t attends s with t - s < S or (t - s) % S == 0.

    Source: Child et al. 2019, section 4.2, both heads' sets in one.
    """

    form = "strided:S"
    n_numbers = n_positive = 1
    needs_mask = True

    def attended_pairs(self, seq_len: int) -> int:
        (stride,) = self.numbers
        strides, rest = divmod(seq_len, stride)
        further = stride * triangle(strides - 1) + strides * rest  # t // stride keys beyond the last `stride`
        return window_pairs(stride, seq_len) + further

    def predicate(self, layer: int, seq_len: int, device: torch.device) -> Predicate:
        (stride,) = self.numbers
        return lambda q, k: (k <= q) & ((q - k < stride) | ((q - k) % stride == 0))


class BigBird(PatternRule):
    """B W G R, in blocks of B positions: the query's block and the W - 1 before it, the first G, and R others between
    these, drawn by layer and block.

    Source: Zaheer et al. 2020, section 2.
    """

    form = "bigbird:B:W:G:R"
    n_numbers, n_positive = 4, 2  # there may be no first and no random blocks
    needs_mask = differs = True

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


PATTERNS: dict[str, type[PatternRule]] = {
    "dense": PatternRule,
    "window": Window,
    "strided": Strided,
    "bigbird": BigBird,
}


def triangle(n: int) -> int:
    """1 + 2 + … + n."""
    return n * (n + 1) // 2


def window_pairs(width: int, seq_len: int) -> int:
    """Pairs of a query and one of the last `width` keys."""
    full = max(seq_len - width, 0)
    return triangle(seq_len - full) + full * width


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
