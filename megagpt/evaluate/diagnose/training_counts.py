"""How often each token is in the data that a run was trained on."""

from __future__ import annotations

import numpy as np
import torch.distributed as dist

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.samples import split_bounds
from megagpt.errors import UserError
from megagpt.generate.trained import Trained

ENOUGH = 100_000_000  # tokens of a dataset, from its beginning: rates of what is rarer are of no account here


def training_counts(trained: Trained) -> np.ndarray | None:
    """Over the training splits of the datasets that its checkpoint names, each by its size.

    None where there are none, or they are not there any more. Shapes: → [V].
    Comm: read by rank 0, and broadcast.
    """
    box: list[np.ndarray | None] = [_read(trained) if trained.mesh.rank == 0 else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _read(trained: Trained) -> np.ndarray | None:
    data, vocab = trained.config.data, trained.config.model.vocab
    counts_V = np.zeros(vocab, dtype=np.int64)
    try:
        for prefix in data.data_path.prefixes:
            dataset = IndexedDataset(prefix)
            (first, end), _, _ = split_bounds(data.split, len(dataset))
            left = ENOUGH
            for document in range(first, end):
                counts_V += np.bincount(dataset.get(document), minlength=vocab)[:vocab]
                left -= int(dataset.lengths[document])
                if left <= 0:
                    break
    except UserError:
        return None
    return counts_V if counts_V.any() else None
