"""Which implementation of attention serves which model: from what positions need and implementations have. No torch."""

from __future__ import annotations

from megagpt.model.attention import IMPLEMENTATIONS
from megagpt.model.position import POSITIONS


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
