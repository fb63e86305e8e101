"""Tokens that training never or rarely showed: how many of the texts' are such, and what they cost."""

from __future__ import annotations

import numpy as np

from megagpt.evaluate.diagnose.evidence import Case, Evidence, as_text

RARER = 10  # times in the training data than in the texts: rarely seen
NAMED = 8


def tokens(case: Case) -> Evidence:
    """Suspects them of what they cost beyond their share of the texts. The end of text is the affair of `ends`."""
    columns = ("seen in training", "tokens", "share of text", "mean loss", "share of loss")
    reading, end_N = case.reading, case.reading.ids == case.answers.tokenizer.eod
    if case.counts is not None:
        title = "tokens seen in training"
        never_N, rarely_N = by_counts(case, case.counts)
    elif case.untrained is not None:
        title = "tokens seen in training, by their embedding (the dataset is not there)"
        never_N, rarely_N = case.untrained[reading.ids], np.zeros(len(end_N), dtype=bool)
    else:
        return Evidence("tokens seen in training: not known, the run's dataset is not there", columns, ())
    never_N, rarely_N = never_N & ~end_N, rarely_N & ~end_N
    groups = {"never": never_N, "rarely": rarely_N, "as here": ~never_N & ~rarely_N & ~end_N, "(end of text)": end_N}
    total = reading.losses.sum()
    rows = [
        (name, f"{len(np.unique(reading.ids[of_N]))}", f"{of_N.mean():.2%}", f"{reading.losses[of_N].mean():.2f}",
         f"{reading.losses[of_N].sum() / total:.1%}")
        for name, of_N in groups.items()
        if of_N.any()
    ]  # fmt: skip
    odd_N = never_N | rarely_N
    excess_D = reading.by_document(np.where(odd_N, reading.losses - reading.surprise, 0))
    sums_V = np.bincount(reading.ids[odd_N], weights=reading.losses[odd_N]) if odd_N.any() else np.zeros(0)
    worst = [as_text(case, [int(i)]) for i in np.argsort(-sums_V)[:NAMED] if sums_V[i] > 0]
    suspicions = case.suspicion(
        "tokens",
        excess_D,
        "Tokens that training never or rarely showed: their embeddings are hardly trained.",
        [
            f"{never_N.mean():.2%} of the text never seen, {rarely_N.mean():.2%} {RARER} times as rare in training",
            f"{reading.losses[odd_N].sum() / total:.1%} of the loss; the most: {', '.join(map(repr, worst))}",
        ],
        "Compare how training and evaluation texts were made (filters, lower case, normalisation, another tokenizer "
        "or version); train on text that has these tokens, or leave such texts out and say so.",
    )
    return Evidence(title, columns, tuple(rows), tuple(suspicions))


def by_counts(case: Case, counts_V: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which of the texts' tokens training never showed, and which it showed rarely.  Shapes: → [N], [N] bool."""
    ids_N = case.reading.ids
    counts_V = np.pad(counts_V, (0, max(0, int(ids_N.max()) + 1 - len(counts_V))))
    seen_N = counts_V[ids_N] / max(1, counts_V.sum())
    return seen_N == 0, (seen_N > 0) & (seen_N < np.exp(-case.reading.surprise) / RARER)
