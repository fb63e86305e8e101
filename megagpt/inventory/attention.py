"""Which implementation of attention serves which model, and what decoding keeps for it. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.model.attention import IMPLEMENTATIONS
from megagpt.model.attention.blocks import QUERIES
from megagpt.model.position import POSITIONS

if TYPE_CHECKING:
    from megagpt.config import ModelConfig

BLOCKS = 4  # with fewer, what they leave out does not pay for computing probabilities twice


def attention_lacks(choice: str, position: str, dropout: float) -> str | None:
    """What a model of these positions and attention dropout needs that this attention has not; None where it has all.

    choice: one of IMPLEMENTATIONS, or auto.
    """
    if choice == "auto":
        return None
    found, adds = IMPLEMENTATIONS[choice], POSITIONS[position].adds
    if dropout > 0 and not found.drops:
        return "attention dropout whose masks do not depend on the layout"
    if adds is not None and adds not in found.adds:
        return f"positions of the kind {position}"
    return None


def attention_runs(choice: str, model: ModelConfig, layer: int, dropping: bool, n_tokens: int | None = None) -> str:
    """Which of IMPLEMENTATIONS runs for a choice (`kernels["attention"]`) in a layer, on n_tokens (None: the context).

    auto: the first that serves of sdpa, blocks where there are enough of them, and softmax, which has all; blocks come
    first where a window leaves out most keys, which sdpa multiplies all the same.
    """
    if choice != "auto":
        return choice
    n_tokens, window = n_tokens or model.seq_len, model.pattern(layer).rule.window
    first = ["sdpa", "blocks"]
    if n_tokens < BLOCKS * QUERIES:
        first.remove("blocks")
    elif window is not None and 2 * (window + QUERIES) <= n_tokens:
        first.reverse()
    served = (name for name in (*first, "softmax") if not attention_lacks(name, model.position, float(dropping)))
    return next(served)


def cached_places(model: ModelConfig, layer: int, n_positions: int) -> int:
    """Places that decoding keeps for a row of n_positions: no more than a window reaches back."""
    return min(n_positions, model.pattern(layer).rule.window or n_positions)


def cached_numbers(model: ModelConfig, layer: int, tp: int, n_positions: int) -> int:
    """Numbers that a rank of tp keeps for a row in this layer: a key and a value of each of its heads and places."""
    return 2 * max(1, model.kv_heads // tp) * model.head_width * cached_places(model, layer, n_positions)
