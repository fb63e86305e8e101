"""Training samples of one dataset: sample i is seq_len + 1 tokens, a pure function of (files, seed, i).

Megatron-core's GPT dataset: the same samples in the same order for the same seed. Its "documents" are the
sequences of the indexed dataset, and its order depends on seq_len and on the number of epochs, thus on
num_samples: a run that is extended into another epoch sees another order. See `index_builder` for the maps.
"""

from __future__ import annotations

import numpy as np
from numpy.random import RandomState

from megagpt.config.values import Split
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.index_builder import (
    build_document_index,
    build_sample_index,
    build_shuffle_index,
    plan_epochs,
)
from megagpt.errors import UserError

_MAX_SAMPLES = 2**40  # 13 TB: beyond it NumPy would stumble over its own sizes


class GPTSamples:
    """At least num_samples samples from documents [start, stop) of a dataset, shuffled by seed.

    may_be_short: a sample may be filled by several passes, as Megatron does.
    **Raises** `UserError` when one pass over the documents does not fill a sample.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        *,
        documents: tuple[int, int],
        num_samples: int,
        seq_len: int,
        seed: int,
        may_be_short: bool = False,
    ) -> None:
        start, stop = documents
        n_tokens = int(dataset.lengths[start:stop].sum(dtype=np.int64))
        if n_tokens <= (0 if may_be_short else seq_len):
            raise UserError(
                f"{dataset.prefix}: documents [{start}, {stop}) hold {n_tokens} tokens, one sample needs "
                f"seq_len + 1 = {seq_len + 1}; give this split a larger share with --split, lower --seq-len, "
                "or add data"
            )
        self.dataset = dataset
        self.n_tokens, self.seq_len = n_tokens, seq_len
        self.epochs = plan_epochs(n_tokens, num_samples, seq_len)
        random = RandomState(seed)  # the order of the draws is part of the format: documents first
        try:
            if self.epochs.n_samples > _MAX_SAMPLES:
                raise MemoryError
            self.document_index = build_document_index(start, stop, self.epochs, random)
            self.sample_index = build_sample_index(dataset.lengths, self.document_index, seq_len, self.epochs.n_samples)
            self.shuffle_index = build_shuffle_index(self.epochs, random)
        except MemoryError:
            raise UserError(
                f"{dataset.prefix}: the order of {self.epochs.n_samples} samples, some 12 bytes each, does not fit in "
                "memory; lower --train-steps or --global-batch-size"
            ) from None

    def __len__(self) -> int:
        return self.epochs.n_samples

    def __getitem__(self, i: int) -> np.ndarray:
        """Tokens of sample i. **Shapes**: int64[seq_len + 1]."""
        parts = [self.dataset.get(*piece) for piece in self.documents_of(i)]
        return np.concatenate(parts, dtype=np.int64)

    def documents_of(self, i: int) -> list[tuple[int, int, int]]:
        """The pieces of sample i, in order: (document, first token, number of tokens); none is empty."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        row = int(self.shuffle_index[i])
        (first, offset), (last, last_offset) = self.sample_index[row : row + 2].tolist()
        pieces = []
        for document in self.document_index[first:last].tolist():
            pieces.append((document, offset, int(self.dataset.lengths[document]) - offset))
            offset = 0
        # The first token of the next sample is the last label of this one.
        pieces.append((int(self.document_index[last]), offset, last_offset + 1 - offset))
        return [piece for piece in pieces if piece[2]]

    def dataset_of(self, i: int) -> IndexedDataset:
        """The dataset that sample i is of."""
        return self.dataset

    def sources_of(self, i: int) -> list[tuple[str, int, int, int]]:
        """The pieces of sample i, in order: (dataset prefix, document, first token, number of tokens)."""
        return [(str(self.dataset.prefix), *piece) for piece in self.documents_of(i)]


def split_bounds(split: Split, n_documents: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Documents [start, stop) of train, validation and test.

    Contiguous, not shuffled. An empty split has start == stop.
    """
    shares = np.array([float(share) for share in split.shares])
    # Summed and rounded as Megatron does (plain floats, half to even): the bounds agree to the document.
    train, valid, test = (shares / shares.sum()).tolist()
    ends = [0.0, train, train + valid, train + valid + test]
    starts = [round(end * float(n_documents)) for end in ends]
    return (starts[0], starts[1]), (starts[1], starts[2]), (starts[2], starts[3])
