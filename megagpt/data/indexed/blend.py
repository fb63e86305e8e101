"""Weighted mixtures of datasets, and the three splits of a run.

Sample s of a blend comes from the dataset that lags most behind its weight: Megatron's greedy rule, without
random numbers. The choice is prefix-stable: a longer blend begins with the shorter one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import Decimal

import numpy as np

from megagpt.config.values import Split
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.index_builder import build_blending_indices
from megagpt.data.indexed.samples import GPTSamples, split_bounds
from megagpt.errors import UserError

_SURPLUS = 0.005  # Megatron's mid_level_dataset_surplus: part of the format, it can add an epoch


class Blend:
    """Samples of several datasets: `choice` says for each which dataset, and which of its samples."""

    def __init__(self, datasets: Sequence[GPTSamples], choice: tuple[np.ndarray, np.ndarray]) -> None:
        self.datasets = list(datasets)
        self.dataset_index, self.dataset_sample_index = choice

    def __len__(self) -> int:
        return len(self.dataset_index)

    def __getitem__(self, i: int) -> np.ndarray:
        """Tokens of sample i. **Shapes**: int64[seq_len + 1]."""
        dataset, sample = self._locate(i)
        return dataset[sample]

    def dataset_of(self, i: int) -> IndexedDataset:
        """The dataset that sample i is of."""
        return self._locate(i)[0].dataset

    def sources_of(self, i: int) -> list[tuple[str, int, int, int]]:
        """The pieces of sample i, in order: (dataset prefix, document, first token, number of tokens)."""
        dataset, sample = self._locate(i)
        return dataset.sources_of(sample)

    def _locate(self, i: int) -> tuple[GPTSamples, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self.datasets[self.dataset_index[i]], int(self.dataset_sample_index[i])


Samples = GPTSamples | Blend


def build_splits(
    datasets: Sequence[IndexedDataset],
    weights: Sequence[Decimal],
    split: Split,
    seq_len: int,
    seed: int,
    num_samples: tuple[int, int, int],
) -> tuple[Samples | None, Samples | None, Samples | None]:
    """Train, validation and test samples; None for a split that is empty or of which 0 samples are asked.

    weights: one a dataset. Without, one dataset is read as it is, and several by the samples that each has.
    **Raises** `UserError` for unreadable data, or a split too small for one sample.
    """
    bounds = [split_bounds(split, len(dataset)) for dataset in datasets]

    def build(which: int) -> Samples | None:
        parts = [(dataset, bound[which]) for dataset, bound in zip(datasets, bounds, strict=True)]
        if num_samples[which] == 0 or all(start == stop for _, (start, stop) in parts):
            return None
        if weights:
            return _blend(parts, [float(weight) for weight in weights], num_samples[which], seq_len, seed)
        if len(parts) > 1:
            return _blend_by_size(parts, num_samples[which], seq_len, seed)
        (dataset, documents), n = parts[0], num_samples[which]
        return GPTSamples(dataset, documents=documents, num_samples=n, seq_len=seq_len, seed=seed)

    return build(0), build(1), build(2)


def sources(samples: Samples) -> list[IndexedDataset]:
    """The datasets that samples come from, in the order of data_path."""
    return [part.dataset for part in parts_of(samples)]


def parts_of(samples: Samples) -> list[GPTSamples]:
    """The samples of each dataset, in the order of data_path."""
    return [samples] if isinstance(samples, GPTSamples) else samples.datasets


def _blend_by_size(
    parts: Sequence[tuple[IndexedDataset, tuple[int, int]]], num_samples: int, seq_len: int, seed: int
) -> Blend:
    """Each dataset as often as it has samples in an epoch: without weights, Megatron reads no more than one of each.

    What does not fill a sample is left out.
    """
    sizes = [_epoch_samples(dataset, documents, seq_len) for dataset, documents in parts]
    parts, sizes = [part for part, n in zip(parts, sizes, strict=True) if n], [n for n in sizes if n]
    if not parts:
        raise UserError(
            f"no dataset fills a sample of seq_len + 1 = {seq_len + 1} tokens in a split; give it a larger share with "
            "--split, lower --seq-len, or add data"
        )
    if num_samples > sum(sizes):
        return _blend(parts, sizes, num_samples, seq_len, seed)
    choice = build_blending_indices(_normalized(sizes), num_samples)
    taken = np.bincount(choice[0], minlength=len(parts)).tolist()
    return Blend(
        [_samples(*part, max(size, n), seq_len, seed) for part, size, n in zip(parts, sizes, taken, strict=True)],
        choice,
    )


def _epoch_samples(dataset: IndexedDataset, documents: tuple[int, int], seq_len: int) -> int:
    return max(0, int(dataset.lengths[slice(*documents)].sum(dtype=np.int64)) - 1) // seq_len


def _blend(
    parts: Sequence[tuple[IndexedDataset, tuple[int, int]]],
    weights: Sequence[float],
    num_samples: int,
    seq_len: int,
    seed: int,
) -> Blend:
    """At least num_samples samples. Sizes are Megatron's: they decide about epochs, thus the order."""
    shares = _normalized(weights)
    targets = [math.ceil(num_samples * share) for share in shares.tolist()]
    # Normalised again, as there: a last bit decides ties.
    choice = build_blending_indices(_normalized(shares), sum(targets))
    taken = np.bincount(choice[0], minlength=len(parts)).tolist()
    datasets = []
    for (dataset, documents), target, needed in zip(parts, targets, taken, strict=True):
        samples = _samples(dataset, documents, math.ceil(target * (1 + _SURPLUS)), seq_len, seed)
        if len(samples) < needed:  # many datasets and few samples: Megatron gives up here
            samples = _samples(dataset, documents, needed, seq_len, seed)
        datasets.append(samples)
    return Blend(datasets, choice)


def _samples(
    dataset: IndexedDataset, documents: tuple[int, int], num_samples: int, seq_len: int, seed: int
) -> GPTSamples:
    """Of a dataset of a blend, which may be shorter than a sample."""
    return GPTSamples(
        dataset, documents=documents, num_samples=num_samples, seq_len=seq_len, seed=seed, may_be_short=True
    )


def _normalized(weights: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.array(weights, np.float64)
    return array / np.sum(array)
