"""Which examples lie in which row: a pure function of their lengths and the seed. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count, islice

import numpy as np
from numpy.random import RandomState

Row = list[int]
"""Numbers of the examples of a row, in their order."""


def training_rows(lengths: np.ndarray, room: int, seed: int, pack: bool) -> Iterator[Row]:
    """Rows without end, pass after pass over all examples, each in an order of its own; a pass begins with a new row.

    So row i is the same however many are taken.
    """
    for number in count():
        yield from epoch_rows(lengths, room, seed, pack, number)


def epoch_rows(lengths: np.ndarray, room: int, seed: int, pack: bool, number: int) -> Iterator[Row]:
    """The rows of one pass, counted from 0."""
    order = RandomState([seed, number]).permutation(len(lengths))
    return packed(lengths, order.tolist(), room, pack)


def rows_of_epochs(lengths: np.ndarray, room: int, seed: int, pack: bool, n_epochs: int) -> int:
    """How many rows that many passes make."""
    return sum(sum(1 for _ in epoch_rows(lengths, room, seed, pack, number)) for number in range(n_epochs))


def first_rows(lengths: np.ndarray, room: int, seed: int, pack: bool, n_rows: int) -> list[Row]:
    """The first n_rows of all."""
    return list(islice(training_rows(lengths, room, seed, pack), n_rows))


def packed(lengths: np.ndarray, order: Sequence[int], room: int, pack: bool = True) -> Iterator[Row]:
    """Rows of examples in this order, each as many as there is room for, in tokens; or one each."""
    row, left = Row(), room
    for example in order:
        length = int(lengths[example])
        if row and (length > left or not pack):
            yield row
            row, left = Row(), room
        row.append(example)
        left -= length
    if row:
        yield row
