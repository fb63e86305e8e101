"""Scores and sums of values where heads of keys and values are shared by groups of query heads, or not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def grouped_scores(q_BHTK: Tensor, k_BGSK: Tensor) -> Tensor:
    """q · k, each key head for H / G neighbouring query heads.  Shapes: → scores_BHTS."""
    T = q_BHTK.shape[2]
    q_BGXK = q_BHTK.unflatten(1, (k_BGSK.shape[1], -1)).flatten(2, 3)  # one matrix for all queries of a key head
    return (q_BGXK @ k_BGSK.transpose(-2, -1)).unflatten(2, (-1, T)).flatten(1, 2)


def weighted_values(p_BHTS: Tensor, v_BGSK: Tensor) -> Tensor:
    """Sums of values, each value head for H / G neighbouring query heads.  Shapes: → y_BHTK."""
    T = p_BHTS.shape[2]
    p_BGXS = p_BHTS.unflatten(1, (v_BGSK.shape[1], -1)).flatten(2, 3)
    return (p_BGXS @ v_BGSK).unflatten(2, (-1, T)).flatten(1, 2)
