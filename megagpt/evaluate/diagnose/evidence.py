"""What a detector is given, and what it hands back. A suspicion is a number: nats per token that its cause explains."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megagpt.evaluate.answers import Answers
from megagpt.evaluate.diagnose.reading import Reading

WORTH_NATS, WORTH_SHARE, SURE = 0.02, 0.01, 2.0  # 2% of the perplexity, 1% of the loss, standard errors


@dataclass(frozen=True)
class Suspicion:
    """A cause that the loss may have.

    nats: per token of all texts, that would be gone with the cause: measured by reading anew where that can be done,
    else what tokens cost beyond the share that they have of the text, which needs no context to know.
    error: its standard error over documents.  strong: twice that below it are still worth a word.
    claim, remedy: for the user.  evidence: what was seen, a line each.
    """

    kind: str
    claim: str
    nats: float
    error: float
    strong: bool
    evidence: tuple[str, ...]
    remedy: str


@dataclass(frozen=True)
class Evidence:
    """Of one detector: a table, and what it makes one suspect."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    suspicions: tuple[Suspicion, ...] = ()


@dataclass(frozen=True, eq=False)
class Case:
    """A model and the texts that it was read on.

    ids: tokens of each text, the end of text behind each where there is one.  reading: as an evaluation reads them.
    counts: how often each token is in the training data; None where that is not known.  untrained: which tokens look,
    by their embedding, as if they were not in it; None likewise.
    """

    answers: Answers
    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    reading: Reading
    counts: np.ndarray | None
    untrained: np.ndarray | None = None

    def suspicion(
        self, kind: str, excess_D: np.ndarray, claim: str, evidence: Sequence[str], remedy: str
    ) -> list[Suspicion]:
        """One whose cause costs each document so many nats, as a list; none where it costs nothing.

        Shapes: excess_D [documents].
        """
        n_tokens = len(self.reading.ids)
        nats = float(excess_D.sum()) / n_tokens
        if nats <= 0:
            return []
        error = math.sqrt(len(excess_D)) * float(excess_D.std()) / n_tokens
        strong = nats - SURE * error > max(WORTH_NATS, WORTH_SHARE * self.reading.loss)
        return [Suspicion(kind, claim, nats, error, strong, tuple(evidence), remedy)]


Detector = Callable[[Case], Evidence]


def as_text(case: Case, ids: Sequence[int]) -> str:
    """Of some tokens, on one line; a token without text by its number."""
    text = case.answers.tokenizer.decode(ids)
    return repr(text)[1:-1] if text else " ".join(f"<{i}>" for i in ids)
