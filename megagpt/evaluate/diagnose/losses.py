"""The distribution of the loss: is it all tokens that cost much, or a few, and which."""

from __future__ import annotations

import numpy as np

from megagpt.evaluate.diagnose.evidence import Case, Evidence, as_text

TRIMMED, WORST, CONTEXT = 0.05, 5, 8


def losses(case: Case) -> Evidence:
    """Suspects the texts where whole documents cost more than their tokens' shares of the text."""
    reading = case.reading
    ordered_N = np.sort(reading.losses)
    cut = int(TRIMMED * len(ordered_N))
    rows = [
        ("mean", f"{reading.loss:.4f}", ""),
        ("mean of the middle 90%", f"{ordered_N[cut : len(ordered_N) - cut].mean():.4f}", ""),
        ("median", f"{np.median(ordered_N):.4f}", ""),
        ("share of the worst 1%", f"{ordered_N[-max(1, len(ordered_N) // 100) :].sum() / ordered_N.sum():.1%}", ""),
        *_worst_tokens(case),
        *_worst_documents(case),
        *_worst_places(case),
    ]
    excess_D = reading.by_document(reading.losses - reading.surprise).clip(min=0)
    odd = [int(d) for d in np.flatnonzero(excess_D)]
    suspicions = case.suspicion(
        "texts",
        excess_D,
        "Texts that the model does worse on than without any context.",
        [f"{len(odd)} of {reading.n_documents} documents; one: {case.texts[d][:50]!r}" for d in odd[:1]],
        "Few documents: look at them (language, encoding, binary data). Most of them: a tokenizer that is not the "
        "model's, or weights that were not read rightly; compare with the run's own validation loss.",
    )
    return Evidence("loss", ("", "nats", "text"), tuple(rows), tuple(suspicions))


def _worst_tokens(case: Case) -> list[tuple[str, str, str]]:
    """Those that carry the most of the loss together."""
    reading = case.reading
    sums_V, counts_V = np.bincount(reading.ids, weights=reading.losses), np.bincount(reading.ids)
    worst = np.argsort(-sums_V)[:WORST]
    total = reading.losses.sum()
    return [
        (f"token, {sums_V[i] / total:.1%} of all", f"{sums_V[i] / counts_V[i]:.2f}", as_text(case, [int(i)]))
        for i in worst
    ]


def _worst_documents(case: Case) -> list[tuple[str, str, str]]:
    reading = case.reading
    sizes_D = reading.by_document(np.ones(len(reading.ids)))
    means_D = reading.by_document(reading.losses) / np.maximum(sizes_D, 1)
    return [(f"document {d}", f"{means_D[d]:.2f}", repr(case.texts[d])[1:-1]) for d in np.argsort(-means_D)[:WORST]]


def _worst_places(case: Case) -> list[tuple[str, str, str]]:
    reading, rows = case.reading, []
    for n in np.argsort(-reading.losses)[:WORST]:
        first = int(np.searchsorted(reading.documents, reading.documents[n]))
        before = as_text(case, reading.ids[max(first, n - CONTEXT) : n].tolist()) if n > first else ""
        rows.append(
            (f"document {reading.documents[n]}, token {n - first}", f"{reading.losses[n]:.2f}",
             f"{before} → {as_text(case, [int(reading.ids[n])])}")
        )  # fmt: skip
    return rows
