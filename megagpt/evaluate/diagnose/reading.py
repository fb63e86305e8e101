"""What a model makes of each token of some texts, read in one way; detectors compare ways, and parts of one.

Shapes: N tokens that were predicted, of all documents, in order; D documents.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from megagpt.evaluate.answers import Answers
from megagpt.evaluate.score import Pair

LOST = 100.0  # nats, in place of a loss that is not finite: more than any finite logits cost in practice


@dataclass(frozen=True, eq=False)
class Reading:
    """ids: the tokens.  documents: of which document each is.  positions: its place in the window, from 0.

    losses: nats.  best: log-probability of the likeliest token there.  hits: whether that is it.
    n_lost: losses that were not finite.
    Shapes: [N] each.
    """

    ids: np.ndarray
    documents: np.ndarray
    positions: np.ndarray
    losses: np.ndarray
    best: np.ndarray
    hits: np.ndarray
    n_documents: int
    n_lost: int = 0

    @property
    def loss(self) -> float:
        """Mean, in nats per token."""
        return float(self.losses.mean())

    @cached_property
    def surprise(self) -> np.ndarray:
        """Nats that each token costs by its share of these very texts: without context, no more are needed.

        Shapes: → [N].
        """
        return np.log(len(self.ids) / np.bincount(self.ids)[self.ids])

    def by_document(self, values_N: np.ndarray) -> np.ndarray:
        """Sums.  Shapes: → [D]."""
        return np.bincount(self.documents, weights=values_N, minlength=self.n_documents)


def read(answers: Answers, ids_D: Sequence[Sequence[int]], window: int | None = None) -> Reading:
    """Each document after the token that begins texts, in windows that share one token.

    window: tokens that are predicted at once; None: as many as the context holds.
    Comm: that of `Answers.scores`.
    """
    window = window or answers.seq_len
    pairs: list[Pair] = []
    owners: list[int] = []
    for document, ids in enumerate(ids_D):
        for start in range(0, len(ids), window):
            context = answers.empty if start == 0 else (ids[start - 1],)
            pairs.append((context, tuple(ids[start : start + window])))
            owners.append(document)
    scores = answers.scores(pairs)
    lengths = [len(score.logprobs) for score in scores]
    losses_N = -np.concatenate([score.logprobs for score in scores]).astype(np.float64)
    finite_N = np.isfinite(losses_N)
    return Reading(
        ids=np.concatenate([np.asarray(ids, dtype=np.int64) for _, ids in pairs]),
        documents=np.repeat(owners, lengths),
        positions=np.concatenate([np.arange(length) for length in lengths]),
        losses=np.where(finite_N, losses_N, LOST),
        best=np.nan_to_num(np.concatenate([score.best for score in scores]).astype(np.float64), neginf=-LOST),
        hits=np.concatenate([score.hits for score in scores]),
        n_documents=len(ids_D),
        n_lost=int((~finite_N).sum()),
    )
