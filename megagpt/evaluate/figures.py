"""Figures of classes, which are no means over documents."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from megagpt.evaluate.task import Figure, Record


def matthews(gold: str, choice: str) -> Figure:
    """Matthews correlation of two numbers of the records, each 0 or 1; 0 where one of them never changes."""

    def found(records: Sequence[Record]) -> float:
        n = _counts(records, gold, choice)
        tp, tn, fp, fn = n[1, 1], n[0, 0], n[0, 1], n[1, 0]
        below = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
        return (tp * tn - fp * fn) / math.sqrt(below) if below else 0.0

    return found


def f1(gold: str, choice: str) -> Figure:
    """Of the class 1: harmonic mean of precision and recall; 0 where it is never right."""

    def found(records: Sequence[Record]) -> float:
        n = _counts(records, gold, choice)
        return 2 * n[1, 1] / (2 * n[1, 1] + n[0, 1] + n[1, 0]) if n[1, 1] else 0.0

    return found


def _counts(records: Sequence[Record], gold: str, choice: str) -> Counter[tuple[int, int]]:
    return Counter((record[gold], record[choice]) for record in records)
