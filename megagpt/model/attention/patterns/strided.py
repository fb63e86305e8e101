"""The last S keys, and every S-th before them (Child et al. 2019, section 4.2, both heads' sets in one)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.model.attention.patterns.kind import PatternRule, triangle
from megagpt.model.attention.patterns.window import window_pairs

if TYPE_CHECKING:
    import torch

    from megagpt.model.attention.patterns.kind import Predicate


class Strided(PatternRule):
    """A query at t attends s with t - s < S or (t - s) % S == 0."""

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
