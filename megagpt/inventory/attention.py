"""Which implementation of attention serves which model, and what decoding keeps for it. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megagpt.model.attention import IMPLEMENTATIONS
from megagpt.model.position import POSITIONS

if TYPE_CHECKING:
    from megagpt.config import ModelConfig


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


def attention_runs(choice: str, position: str, dropping: bool) -> str:
    """Which of IMPLEMENTATIONS runs for a choice (`kernels["attention"]`).

    auto: scaled_dot_product_attention, which keeps no probabilities, where it serves.
    """
    if choice != "auto":
        return choice
    return "softmax" if attention_lacks("sdpa", position, float(dropping)) else "sdpa"


def cached_places(model: ModelConfig, layer: int, n_positions: int) -> int:
    """Places that decoding keeps for a row of n_positions: no more than a window reaches back."""
    return min(n_positions, model.pattern(layer).rule.window or n_positions)


def cached_numbers(model: ModelConfig, layer: int, tp: int, n_positions: int) -> int:
    """Numbers that a rank of tp keeps for a row in this layer: a key and a value of each of its heads and places."""
    return 2 * max(1, model.kv_heads // tp) * model.head_width * cached_places(model, layer, n_positions)
