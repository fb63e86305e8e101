"""What is in a checkpoint, and in what two of them differ, in numbers; a chunk of a tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megagpt.checkpoint.chunks import read_chunks, row_boxes
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.state import State
from megagpt.inventory.parameter import WEIGHT


@dataclass(frozen=True)
class Summary:
    """A tensor in numbers. norm, low, high: of the finite values (NaN where there are none)."""

    key: str
    name: str
    shape: tuple[int, ...]
    norm: float
    low: float
    high: float
    n_not_finite: int


@dataclass(frozen=True)
class TensorDifference:
    """Two tensors that are not bitwise the same.

    what: in words. n_tensors: that this is about. n_values: that differ. largest: absolute; relative: to the first
    one's largest element.
    """

    key: str
    name: str
    what: str
    n_values: int = 0
    largest: float = math.nan
    relative: float = math.nan
    n_tensors: int = 1


def summaries(reader: Reader) -> Iterator[Summary]:
    """Each tensor in numbers."""
    for key in _weights_first(reader.index):
        for name in sorted(reader.index[key], key=_in_order):
            squares, low, high, n_bad = 0.0, math.inf, -math.inf, 0
            for chunk in read_chunks(reader, key, name):
                finite = chunk[np.isfinite(chunk)]
                n_bad += chunk.size - finite.size
                if finite.size:
                    squares += float(np.square(finite, dtype=np.float64).sum())
                    low, high = min(low, float(finite.min())), max(high, float(finite.max()))
            none = low > high
            norm, low, high = (math.nan,) * 3 if none else (math.sqrt(squares), low, high)
            yield Summary(key, name, reader.shape(key, name), norm, low, high, n_bad)


def differing_tensors(
    a: Reader, b: Reader, tick: Callable[[int], None] = lambda n_bytes: None
) -> Iterator[TensorDifference]:
    """The tensors that are not bitwise equal, and those that only one of them has. tick: told bytes read."""
    for key in _weights_first(a.index.keys() | b.index.keys()):
        ours, theirs = a.index.get(key, {}), b.index.get(key, {})
        if not (ours and theirs):  # the mean of weights and imported ones have no moments at all
            which, n_tensors = _only_in(bool(ours)), len(ours or theirs)
            yield TensorDifference(key, f"all {n_tensors}", which, n_tensors=n_tensors)
            continue
        for name in sorted(ours.keys() | theirs.keys(), key=_in_order):
            if name not in theirs or name not in ours:
                yield TensorDifference(key, name, _only_in(name in ours))
            elif ours[name].shape != theirs[name].shape:
                yield TensorDifference(key, name, f"shape {ours[name].shape} and {theirs[name].shape}")
            else:
                found = _difference(a, b, key, name)
                tick(4 * math.prod(ours[name].shape))
                if found:
                    yield found


def differing_fields(a: State, b: State) -> list[tuple[str, Any, Any]]:
    """(dotted name, value in a, value in b) of what two states differ in; None where one has no such field."""
    ours, theirs = dict(_flat("", asdict(a))), dict(_flat("", asdict(b)))
    names = dict.fromkeys([*ours, *theirs])
    return [(n, ours.get(n), theirs.get(n)) for n in names if ours.get(n) != theirs.get(n)]


def _difference(a: Reader, b: Reader, key: str, name: str) -> TensorDifference | None:
    n_values, largest, scale = 0, 0.0, 0.0
    for start, shape in row_boxes(a.shape(key, name)):
        x, y = a.read(key, name, start, shape), b.read(key, name, start, shape)
        scale = max(scale, float(np.abs(x).max(initial=0.0)))  # NaN stays: nothing is relative to it
        bits_differ = x.view(np.int32) != y.view(np.int32)
        if bits_differ.any():
            n_values += int(bits_differ.sum())
            with np.errstate(invalid="ignore"):  # Inf - Inf
                apart = float(np.abs(x[bits_differ].astype(np.float64) - y[bits_differ]).max())
            largest = apart if math.isnan(apart) else max(largest, apart)
    if n_values == 0:
        return None
    relative = largest / scale if scale > 0 else math.nan
    what = "NaN or Inf" if not math.isfinite(largest) else "values differ"
    return TensorDifference(key, name, what, n_values, largest, relative)


def _only_in(first: bool) -> str:
    return f"only in the {'first' if first else 'second'}"


def _weights_first(keys: Iterable[str]) -> list[str]:
    return sorted(keys, key=lambda key: (key != WEIGHT, key))


def _in_order(name: str) -> list[tuple[int, str]]:
    """blocks.2 before blocks.10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _flat(prefix: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value
