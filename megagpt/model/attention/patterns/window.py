"""The last W keys (Beltagy et al. 2020, section 3.1; Mistral: Jiang et al. 2023, section 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.model.attention.patterns.kind import PatternRule, triangle

if TYPE_CHECKING:
    import torch

    from megagpt.model.attention.patterns.kind import Predicate


class Window(PatternRule):
    """A query at t attends s with t - s < W."""

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


def window_pairs(width: int, seq_len: int) -> int:
    """Pairs of a query and one of the last `width` keys."""
    full = max(seq_len - width, 0)
    return triangle(seq_len - full) + full * width
