"""How often the tokens of a dataset are read where a run has changed the order of its samples; estimated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megagpt.data.indexed.blend import Samples
from megagpt.data.indexed.samples import GPTSamples

_DOCUMENTS, _TOKENS = 500, 4000  # that are looked at, and of each


def times_read(parts: Sequence[tuple[Samples, range]]) -> np.ndarray:
    """The share of tokens that is read 0, 1, 2 … times by positions of one order, then of another, of the same text.

    **Shapes**: float64[most times + 1].
    """
    by_dataset: dict[int, list[tuple[GPTSamples, np.ndarray]]] = {}
    for samples, positions in parts:
        for place, (one, indices) in enumerate(_of_each_dataset(samples, positions)):
            by_dataset.setdefault(place, []).append((one, indices))
    counts = np.zeros(1, np.int64)
    for reads in by_dataset.values():
        found = np.bincount(_counts(reads))
        counts = np.pad(counts, (0, max(0, len(found) - len(counts))))
        counts[: len(found)] += found
    return counts / max(1, counts.sum())


def _of_each_dataset(samples: Samples, positions: range) -> list[tuple[GPTSamples, np.ndarray]]:
    """Which samples of each dataset are read."""
    if isinstance(samples, GPTSamples):
        return [(samples, np.arange(positions.start, positions.stop))]
    dataset = samples.dataset_index[positions.start : positions.stop]
    sample = samples.dataset_sample_index[positions.start : positions.stop]
    return [(one, sample[dataset == i]) for i, one in enumerate(samples.datasets)]


def _counts(reads: Sequence[tuple[GPTSamples, np.ndarray]]) -> np.ndarray:
    """How often each token of some documents is read. **Shapes**: int64[tokens looked at]."""
    first = reads[0][0]
    documents = np.unique(first.document_index)
    documents = documents[np.linspace(0, len(documents) - 1, min(len(documents), _DOCUMENTS)).astype(int)]
    counts = {int(d): np.zeros(min(int(first.dataset.lengths[d]), _TOKENS), np.int64) for d in documents}
    for samples, indices in reads:
        is_read = np.zeros(samples.epochs.n_samples + 1, bool)  # the last tokens of all epochs fill no sample
        is_read[samples.shuffle_index[indices]] = True
        lengths = samples.dataset.lengths[samples.document_index]
        begins = np.cumsum(lengths, dtype=np.int64) - lengths
        for place in np.flatnonzero(np.isin(samples.document_index, documents)):
            count = counts[int(samples.document_index[place])]
            rows = (begins[place] + np.arange(len(count))) // samples.seq_len
            count += is_read[np.minimum(rows, samples.epochs.n_samples)]
    return np.concatenate([*counts.values(), np.zeros(0, np.int64)])
