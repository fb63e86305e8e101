"""Low precision: what the same weights cost in fp32, values that are not finite, ties of the likeliest tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from megagpt.evaluate.answers import Answers
from megagpt.evaluate.diagnose.evidence import Case, Evidence
from megagpt.evaluate.diagnose.reading import LOST, Reading, read


def precision(case: Case) -> Evidence:
    """Suspects the precision of what fp32 costs less; in fp32, of the losses that are not finite."""
    reading, dtype = case.reading, case.answers.trained.stage.weight.dtype
    name = str(dtype).removeprefix("torch.")
    rows = [(name, f"{reading.loss:.4f}", f"{ties(reading):.2%}", f"{reading.n_lost}", "")]
    gain_D, evidence = reading.by_document(np.where(reading.losses >= LOST, reading.losses, 0)), []
    if dtype != torch.float32:
        with in_fp32(case.answers) as answers:
            exact = read(answers, case.ids)
        apart_N = np.abs(exact.losses - reading.losses)
        rows.append(("float32", f"{exact.loss:.4f}", f"{ties(exact):.2%}", f"{exact.n_lost}", f"{apart_N.mean():.4f}"))
        gain_D = reading.by_document(reading.losses) - exact.by_document(exact.losses)
        evidence.append(f"{name} {reading.loss:.3f}, float32 with the same weights {exact.loss:.3f}; a token's loss "
                        f"differs by {apart_N.mean():.3f} in the mean, {apart_N.max():.2f} at most")  # fmt: skip
    evidence.append(f"{ties(reading):.2%} of the tokens tie with the likeliest one; {reading.n_lost} not finite")
    suspicions = case.suspicion(
        "precision",
        gain_D,
        f"Rounding or overflow in {name}: logits too large, or too close, for its digits.",
        evidence,
        "Evaluate with --precision fp32; in training a z-loss (--optim.z-loss) keeps logits small.",
    )
    columns = ("arithmetic", "nats", "ties", "not finite", "apart")
    return Evidence("precision", columns, tuple(rows), tuple(suspicions))


def ties(reading: Reading) -> float:
    """Share of the tokens that are as likely as the likeliest one, and are not it."""
    return float(((reading.best == -reading.losses) & ~reading.hits).mean())


@contextmanager
def in_fp32(answers: Answers) -> Iterator[Answers]:
    """The same model, whose stage is converted for as long as the block lasts: no bit of its weights is lost."""
    stage = answers.trained.stage
    dtype = stage.weight.dtype
    stage.to(torch.float32)
    try:
        yield Answers(answers.trained, answers.kept, answers.show)
    finally:
        stage.to(dtype)
