"""Is the likeliest token right as often as the model says it is."""

from __future__ import annotations

import numpy as np

from megagpt.evaluate.diagnose.evidence import Case, Evidence

BINS = 10


def calibration(case: Case) -> Evidence:
    """Suspects the confidence of what the log-probability of "the likeliest is it" would gain with true rates.

    Reference: Guo et al. 2017, of reliability diagrams; bins of equally many tokens.
    """
    reading = case.reading
    said_N, right_N = np.exp(reading.best).clip(1e-6, 1 - 1e-6), reading.hits
    rows, gain_N, off = [], np.zeros(len(said_N)), 0.0
    for of_n in np.array_split(np.argsort(said_N, kind="stable"), BINS):
        if not len(of_n):
            continue
        said, right = said_N[of_n], right_N[of_n]
        rate = (right.sum() + 0.5) / (len(right) + 1)
        rows.append((f"{said.min():.3f} to {said.max():.3f}", f"{said.mean():.3f}", f"{right.mean():.3f}"))
        gain_N[of_n] = np.where(right, np.log(rate / said), np.log((1 - rate) / (1 - said)))
        off += (said.mean() - right.mean()) * len(of_n) / len(said_N)
    sure = off > 0
    suspicions = case.suspicion(
        "calibration",
        reading.by_document(gain_N),
        f"Probabilities that are not those of being right: the model is too {'sure of itself' if sure else 'unsure'}.",
        [f"the likeliest token is right in {right_N.mean():.1%}; said: {said_N.mean():.1%}"],
        (
            "Other text than in training, or overfitted: compare with its training loss. "
            if sure
            else "Too few steps, or too low a learning rate: see whether its training loss still falls. "
        )
        + "Look also at logit_scale, and the scale of weights after a conversion.",
    )
    return Evidence("calibration of the likeliest token", ("said", "mean", "right"), tuple(rows), tuple(suspicions))
