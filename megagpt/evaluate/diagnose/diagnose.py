"""Why a number is odd: what a model makes of some texts is looked at from several sides, and suspicions are ranked.

A new side is a file with a `Detector` and a line of DETECTORS. None knows of the others: each says how many nats per
token its cause explains, which makes them comparable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from megagpt.errors import UserError
from megagpt.evaluate.answers import Answers
from megagpt.evaluate.diagnose.calibration import calibration
from megagpt.evaluate.diagnose.classes import classes
from megagpt.evaluate.diagnose.detokenise import detokenise
from megagpt.evaluate.diagnose.ends import ends
from megagpt.evaluate.diagnose.evidence import Case, Detector, Evidence, Suspicion
from megagpt.evaluate.diagnose.losses import losses
from megagpt.evaluate.diagnose.position import position
from megagpt.evaluate.diagnose.precision import precision
from megagpt.evaluate.diagnose.reading import read
from megagpt.evaluate.diagnose.tokens import tokens
from megagpt.evaluate.diagnose.training_counts import training_counts
from megagpt.evaluate.diagnose.untrained import untrained

DETECTORS: tuple[Detector, ...] = (losses, tokens, position, classes, calibration, ends, detokenise, precision)
TOKENS = 32_768  # that are read, each about ten times
LONGEST = 64 * 1024  # characters of a document that are looked at


@dataclass(frozen=True)
class Findings:
    """loss: nats per token.  suspicions: that which explains the most of the loss first."""

    loss: float
    n_tokens: int
    n_documents: int
    evidence: tuple[Evidence, ...]

    @property
    def suspicions(self) -> list[Suspicion]:
        """Of all detectors, the strong ones first, by nats."""
        found = [one for evidence in self.evidence for one in evidence.suspicions]
        return sorted(found, key=lambda one: (not one.strong, -one.nats))

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        about = {"loss": self.loss, "n_tokens": self.n_tokens, "n_documents": self.n_documents}
        tables = [{"title": e.title, "columns": e.columns, "rows": e.rows} for e in self.evidence]
        return about | {"suspicions": [asdict(one) for one in self.suspicions], "evidence": tables}


def diagnose(answers: Answers, documents: Sequence[str], n_tokens: int = TOKENS) -> Findings:
    """Of an open model, on texts of the evaluation whose number is odd.

    n_tokens: so many are looked at, about, of documents spread evenly over all.
    Comm: collective over all ranks, as `Answers` is.
    Raises UserError where the documents hold no text.
    """
    texts, ids_D = _some(answers, [text for text in documents if text], n_tokens)
    if not texts:
        raise UserError("got no text to diagnose", "wanted a document that is not empty", "name another file")
    reading = read(answers, ids_D)
    case = Case(answers, texts, ids_D, reading, training_counts(answers.trained), untrained(answers))
    return Findings(reading.loss, len(reading.ids), len(texts), tuple(detect(case) for detect in DETECTORS))


def _some(answers: Answers, documents: list[str], n_tokens: int) -> tuple[list[str], list[list[int]]]:
    """Documents in an order that spreads them over all, until they hold so many tokens; each with its end of text."""
    end = [] if answers.tokenizer.eod is None else [answers.tokenizer.eod]
    texts: list[str] = []
    ids_D: list[list[int]] = []
    left = n_tokens
    for i in np.random.default_rng(0).permutation(len(documents)):
        text = documents[i][:LONGEST]
        ids = answers.tokenizer.encode(text)
        if ids and left > 0:
            texts.append(text)
            ids_D.append(ids + end)
            left -= len(ids)
    return texts, ids_D
