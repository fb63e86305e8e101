"""Rows of examples as micro-batches: tokens, places within documents, what is learned, and what is asked.

Shapes: B rows, T tokens of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from megagpt.data.loader import MicroBatch, Rows
from megagpt.data.targets import Answers
from megagpt.finetune.example import Example, Examples
from megagpt.finetune.packing import Row


class PackedRows(Rows):
    """Rows of packed examples. What is left of a row is a document of zeros that nothing is learned of.

    asks: whether a classifier answers at the end of each example.
    """

    def __init__(self, examples: Examples, rows: Sequence[Row], seq_len: int, asks: bool) -> None:
        self.examples, self.rows, self.seq_len, self.asks = examples, rows, seq_len, asks
        self._n_counted = np.array([example.n_counted for example in examples.found], np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> np.ndarray:
        documents = [document for example in self._row(i) for document in example.documents]
        return np.concatenate([np.zeros(0, np.int64), *(document.ids[:-1] for document in documents)]).astype(np.int64)

    def sources_of(self, i: int) -> list[tuple[str, int, int, int]]:
        """The pieces of row i, in order: (file, line, first token, number of tokens)."""
        return [(self.examples.path, example.line, 0, example.n_tokens) for example in self._row(i)]

    def micro_batch(self, positions: range, step: range) -> MicroBatch:
        """The rows at these positions, each label and each answer of the step with the same share in its mean."""
        B, T = len(positions), self.seq_len
        n_counted = sum(int(self._n_counted[row].sum()) for row in self.rows[step.start : step.stop])
        n_asked = sum(len(row) for row in self.rows[step.start : step.stop])
        batch = _Filled(B, T, of_label=len(step) * T / max(1, n_counted), of_answer=len(step) * T / max(1, n_asked))
        for b, position in enumerate(positions):
            batch.fill(b, self.rows[position], self._row(position))
        answers = Answers(batch.values_BT, batch.shares_BT, batch.mates_BT, batch.examples_BT) if self.asks else None
        return MicroBatch(
            batch.tokens_BT, batch.labels_BT, torch.tensor(positions), batch.positions_BT, batch.weights_BT, answers
        )

    def _row(self, i: int) -> list[Example]:
        return [self.examples.found[example] for example in self.rows[i]]


class _Filled:
    """The tensors of a micro-batch, filled row by row."""

    def __init__(self, B: int, T: int, of_label: float, of_answer: float) -> None:
        self.of_label, self.of_answer, self.T = of_label, of_answer, T
        self.tokens_BT, self.labels_BT, self.positions_BT = (torch.zeros(B, T, dtype=torch.int64) for _ in range(3))
        self.weights_BT, self.values_BT, self.shares_BT = (torch.zeros(B, T) for _ in range(3))
        self.mates_BT, self.examples_BT = (torch.full((B, T), -1) for _ in range(2))

    def fill(self, b: int, numbers: Row, row: list[Example]) -> None:
        """Lay the examples of row b side by side."""
        at = 0
        for number, example in zip(numbers, row, strict=True):
            ends = []
            for ids, counts in example.documents:
                place = slice(at, at + len(counts))
                counted = torch.from_numpy(counts)
                self.tokens_BT[b, place] = torch.from_numpy(ids[:-1].astype(np.int64))
                self.labels_BT[b, place] = torch.from_numpy(ids[1:].astype(np.int64)).masked_fill(~counted, 0)
                self.positions_BT[b, place] = torch.arange(len(counts))
                self.weights_BT[b, place] = counted * self.of_label
                at = place.stop
                ends.append(at - 1)
            self.examples_BT[b, ends[-1]] = number
            self.mates_BT[b, ends[-1]] = ends[0] if len(ends) > 1 else -1
            if example.answer is not None:
                self.values_BT[b, ends[-1]] = example.answer
                self.shares_BT[b, ends[-1]] = self.of_answer
        self.positions_BT[b, at:] = torch.arange(self.T - at)
