"""The maps from "sample i" to tokens, as pure functions of numbers: Megatron-core's, element for element.

An *epoch* is one pass over the documents of a split. A *sample* is seq_len + 1 consecutive tokens of the
epochs laid end to end; neighbours share one token. Three maps lead from i to the tokens:

    shuffle_index[i] = row  →  sample_index[row] = (position, offset)  →  document_index[position] = document

Sequential work is done in C++ (csrc/index_builder.cpp), or by NumPy with the same result.
**Source** Megatron-core 0.16, datasets/gpt_dataset.py and helpers.cpp; the tests compare with that package.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.random import RandomState

_built: ModuleType | None
try:
    from megagpt import _index_builder as _built

    _why_not = ""
except ImportError as error:
    _built, _why_not = None, str(error)

_LITTLE = 0.8  # share of its samples below which a last epoch is shuffled apart


@dataclass(frozen=True)
class Epochs:
    """How often the documents are read, and how much of that is shuffled together; the rest follows apart."""

    n_epochs: int
    n_samples: int  # all that n_epochs hold: at least as many as were asked for
    n_epochs_together: int  # n_epochs, or n_epochs - 1 with a last epoch apart
    n_samples_together: int


def fallback_note() -> str | None:
    """What a run says at its start where NumPy builds the maps; None where C++ does."""
    if _built is not None:
        return None
    return f"note: NumPy builds the order of the samples, slower than C++ would ({_why_not}); run `make build`"


def plan_epochs(tokens_per_epoch: int, num_samples: int, seq_len: int) -> Epochs:
    """Epochs that num_samples samples need. A last epoch of which little is used is shuffled apart, so that
    the earlier ones are read completely."""
    n_epochs = max(1, -(-(num_samples * seq_len + 1) // tokens_per_epoch))
    n_samples = (n_epochs * tokens_per_epoch - 1) // seq_len
    if n_epochs > 1:
        before_last = ((n_epochs - 1) * tokens_per_epoch - 1) // seq_len
        if num_samples - before_last < int(_LITTLE * ((tokens_per_epoch - 1) // seq_len)):
            return Epochs(n_epochs, n_samples, n_epochs - 1, before_last)
    return Epochs(n_epochs, n_samples, n_epochs, n_samples)


def build_document_index(start: int, stop: int, epochs: Epochs, random: RandomState) -> np.ndarray:
    """Documents [start, stop) once per epoch, shuffled. **Shapes**: int32[n_epochs * (stop - start)].

    Draws from `random`.
    """
    index = np.tile(np.arange(start, stop, dtype=np.int32), epochs.n_epochs)
    _shuffle_in_two(index, epochs.n_epochs_together * (stop - start), random)
    return index


def build_sample_index(lengths: np.ndarray, document_index: np.ndarray, seq_len: int, n_samples: int) -> np.ndarray:
    """Where each sample begins. **Shapes**: [n_samples + 1, 2] of (position in document_index, token offset).

    int32, or int64 where document_index is too long for that. `lengths`: int32, tokens of each document of
    the dataset. **Raises** `ValueError` for fewer tokens than n_samples * seq_len + 1.
    """
    dtype = sample_index_dtype(len(document_index))
    if _built is None:
        return sample_index_numpy(lengths, document_index, seq_len, n_samples, dtype)
    build = _built.sample_index_int32 if dtype == np.int32 else _built.sample_index_int64
    aligned = np.require(lengths, np.int32, ["C", "A"])  # arrays mapped from an .idx begin at byte 34
    return build(aligned, document_index, seq_len, n_samples)


def sample_index_dtype(n_positions: int) -> type[np.signedinteger]:
    """int32 while positions fit (offsets do: a document's length is an int32)."""
    return np.int32 if n_positions <= np.iinfo(np.int32).max else np.int64


def sample_index_numpy(
    lengths: np.ndarray,
    document_index: np.ndarray,
    seq_len: int,
    n_samples: int,
    dtype: type[np.signedinteger],
) -> np.ndarray:
    """`build_sample_index` in closed form: row r begins at token r * seq_len of all epochs end to end."""
    lengths_in_order = lengths[document_index]
    ends = np.cumsum(lengths_in_order, dtype=np.int64)
    tokens = np.arange(n_samples + 1, dtype=np.int64) * seq_len
    if tokens[-1] >= (ends[-1] if len(ends) else 0):
        raise ValueError("fewer tokens than n_samples * seq_len + 1")
    position = np.searchsorted(ends, tokens, side="right")
    position[0] = 0  # even where the first documents are empty
    tokens -= ends[position]
    tokens += lengths_in_order[position]
    tokens[0] = 0
    rows = np.empty((n_samples + 1, 2), dtype)
    rows[:, 0], rows[:, 1] = position, tokens
    return rows


def build_shuffle_index(epochs: Epochs, random: RandomState) -> np.ndarray:
    """The order of the samples. **Shapes**: uint32[n_samples], or int64 where that is too narrow.

    Draws from `random`.
    """
    index = np.arange(epochs.n_samples, dtype=shuffle_index_dtype(epochs.n_samples))
    _shuffle_in_two(index, epochs.n_samples_together, random)
    return index


def shuffle_index_dtype(n_samples: int) -> type[np.integer]:
    """uint32 below 2^32 - 2 samples (Megatron's bound), else int64."""
    return np.uint32 if n_samples < np.iinfo(np.uint32).max - 1 else np.int64


def build_blending_indices(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For sample s of a blend: the dataset that lags most behind its weight, and how many it gave before.

    `weights`: float64[n], summing to 1. The choice for s does not depend on size, so a longer blend begins
    with the shorter one. **Shapes**: int16[size], int64[size].
    """
    if _built is None:
        return blending_indices_numpy(weights, size)
    return _built.blending_indices(np.require(weights, np.float64, ["C", "A"]), size)


def blending_indices_numpy(weights: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`build_blending_indices`, choice by choice, for each depends on the ones before.

    With lists: blends have few datasets, and for those NumPy is slower.
    """
    dataset, sample = np.empty(size, np.int16), np.empty(size, np.int64)
    shares, taken = weights.tolist(), [0] * len(weights)
    for s in range(size):
        drawn = max(s, 1)
        lags = [share * drawn - count for share, count in zip(shares, taken, strict=True)]
        chosen = lags.index(max(lags))
        dataset[s] = chosen
        taken[chosen] += 1
    for i, count in enumerate(taken):
        sample[dataset == i] = np.arange(count)
    return dataset, sample


def _shuffle_in_two(index: np.ndarray, first: int, random: RandomState) -> None:
    _shuffle(index[:first], random)
    _shuffle(index[first:], random)


def _shuffle(index: np.ndarray, random: RandomState) -> None:
    """random.shuffle(index), the same numbers, in C++: without the GIL, so that other threads go on meanwhile."""
    if _built is None or len(index) > 2**32:
        random.shuffle(index)
        return
    state: Any = random.get_state()
    kind, key, place, *normal = state
    random.set_state((kind, key, _built.shuffle(index, key, place), *normal))
