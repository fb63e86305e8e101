"""Loss by position in the window: does more context help, or does it harm beyond some length."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from megagpt.evaluate.diagnose.evidence import Case, Evidence
from megagpt.evaluate.diagnose.reading import read

SHORTEST = 8  # tokens of a window


def position(case: Case) -> Evidence:
    """Suspects the context of what is gained by windows of powers of two, ever shorter while that helps."""
    reading = case.reading
    reached = int(reading.positions.max()) + 1
    edges = [0, *(2**k for k in range(2, reached.bit_length())), reached]
    rows = [
        (f"{first} to {end - 1}", f"{of_N.mean():.2%}", f"{reading.losses[of_N].mean():.3f}")
        for first, end in pairwise(edges)
        if (of_N := (reading.positions >= first) & (reading.positions < end)).any()
    ]
    window, best, gain_D, tried = reached, 0.0, np.zeros(reading.n_documents), []
    length = 2 ** (max(1, reached - 1).bit_length() - 1)
    while length >= SHORTEST and length * 4 >= window:  # one that harms may still hide one that helps
        shorter = read(case.answers, case.ids, length)
        tried.append(f"{length}: {shorter.loss:.3f}")
        found_D = reading.by_document(reading.losses) - shorter.by_document(shorter.losses)
        if found_D.sum() > best:
            window, best, gain_D = length, float(found_D.sum()), found_D
        length //= 2
    suspicions = case.suspicion(
        "position",
        gain_D,
        f"Context beyond what the model learned to use: windows of {window} tokens cost less than of {reached}.",
        [f"loss in windows of {reached}: {reading.loss:.3f}, {', '.join(tried)}"],
        "Evaluate with windows no longer than what was trained (sequence length of training, also while it grew); "
        "train on longer ones, or take positions that reach further.",
    )
    return Evidence("loss by position in the window", ("position", "share", "nats"), tuple(rows), tuple(suspicions))
