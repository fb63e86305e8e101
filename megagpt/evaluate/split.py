"""Loss, perplexity and bits per byte of a trained model over a whole split of a dataset.

Shapes: B windows at a time, T seq_len.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from megagpt import metrics
from megagpt.config.values import Split
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.samples import split_bounds
from megagpt.data.indexed.text_bytes import text_bytes
from megagpt.data.tokenizers.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.generate.trained import Trained

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Evaluation:
    """loss: mean nats per token. bits_per_byte: None without a tokenizer, or where bytes of text are not known."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    n_tokens: int


@torch.no_grad()
def evaluate(
    trained: Trained,
    dataset: IndexedDataset,
    *,
    split: Split,
    which: str,
    max_tokens: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Read one of the splits of a dataset end to end in windows of seq_len, each token once.

    progress is told, after each batch, the number of tokens done and of all.  Replicas take turns with the batches.
    Comm: that of `Stage.loss`; with replicas, an all-reduce of two numbers at the end.
    Raises UserError where there is no token to predict, or one that the model does not know.
    """
    first, end = split_bounds(split, len(dataset))[SPLITS.index(which)]
    sizes = trained.tokenizer.token_bytes() if trained.tokenizer else None
    data, vocab = trained.mesh.data, trained.config.model.vocab
    total, n_tokens, n_bytes = 0.0, 0, 0.0
    expected = min(max(0, int(dataset.lengths[first:end].sum()) - 1), max_tokens or np.iinfo(np.int64).max)
    for i, text in enumerate(_windows(dataset, first, end, trained.config.model.seq_len, batch_size, max_tokens)):
        if int(text.max()) >= vocab:
            got, wanted = f"{dataset.prefix} has token id {text.max()}", f"wanted 0 to {vocab - 1}, the model's"
            raise UserError(got, wanted, "give a dataset of its own tokenizer")
        labels = text[:, 1:]
        if i % data.size == data.rank:
            tokens_BT, labels_BT = (torch.from_numpy(part.copy()).to(trained.device) for part in (text[:, :-1], labels))
            total += trained.stage.loss(tokens_BT, labels_BT) * labels.size
            n_bytes += _bytes(labels, dataset, trained.tokenizer, sizes)
        n_tokens += labels.size
        progress(n_tokens, expected)
    if n_tokens == 0:
        got = f"{dataset.prefix}: the {which} share of split {split}"
        raise UserError(got, "has no tokens to predict", "choose another split")
    sums = torch.tensor([total, n_bytes], dtype=torch.float64, device=trained.device)
    if data.size > 1:
        dist.all_reduce(sums, group=data.group)
    loss, n_bytes = float(sums[0]) / n_tokens, float(sums[1])
    bits = metrics.bits_per_byte(loss, n_tokens, n_bytes) if n_bytes > 0 else None
    return Evaluation(loss, metrics.perplexity(loss), bits, n_tokens)


def _bytes(labels: np.ndarray, dataset: IndexedDataset, tokenizer: Tokenizer | None, sizes: np.ndarray | None) -> float:
    """Those of the labels' text; NaN, which a sum keeps, where they cannot be known."""
    found = None if tokenizer is None or sizes is None else text_bytes(labels, dataset.meta, tokenizer, sizes)
    return math.nan if found is None else found


def _windows(
    dataset: IndexedDataset, first: int, end: int, seq_len: int, batch_size: int, max_tokens: int | None
) -> Iterator[np.ndarray]:
    """Batches of T + 1 tokens, neighbours sharing one; the last batches are one shorter window each."""
    pending = np.empty(0, dtype=np.int64)
    left = max_tokens if max_tokens is not None else np.iinfo(np.int64).max
    for document in range(first, end):
        pending = np.concatenate([pending, dataset.get(document)])
        while len(pending) > batch_size * seq_len and left >= batch_size * seq_len:
            yield np.stack([pending[i * seq_len : (i + 1) * seq_len + 1] for i in range(batch_size)])
            pending = pending[batch_size * seq_len :]
            left -= batch_size * seq_len
        if left < batch_size * seq_len and len(pending) > left:
            break
    while len(pending) > 1 and left > 0:
        length = int(min(seq_len, len(pending) - 1, left))
        yield pending[None, : length + 1]
        pending = pending[length:]
        left -= length
