"""End of text: does the model expect it where texts end, and does it help or harm where they begin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megagpt.evaluate.diagnose.evidence import Case, Evidence

BEGINNING = 32  # tokens, over which what stands before a text is felt
SEPARATORS = ("", "\n", "\n\n")


def ends(case: Case) -> Evidence:
    """Suspects the end of text of what it costs beyond its share, and of what beginnings gain without it."""
    reading, tokenizer = case.reading, case.answers.tokenizer
    columns = ("", "nats")
    if tokenizer.eod is None:
        return Evidence("end of text: the tokenizer has none", columns, ())
    rows, evidence = [], []
    end_N = reading.ids == tokenizer.eod
    loss, alone = reading.losses[end_N].mean(), reading.surprise[end_N].mean()
    rows += [("end of text where a text ends", f"{loss:.3f}"), ("by its share of the text alone", f"{alone:.3f}")]
    evidence.append(f"where texts end it has probability {np.exp(-loss):.1e}, its share there is {np.exp(-alone):.1e}")
    excess_D = reading.by_document(np.where(end_N, reading.losses - reading.surprise, 0))
    beginnings = [tuple(ids[: min(BEGINNING, case.answers.seq_len - 1)]) for ids in case.ids]
    usual_D = _beginnings(case, beginnings, case.answers.empty)
    n_begun = sum(len(ids) - 1 for ids in beginnings)
    rows.append((f"tokens 2 to {BEGINNING} of a text, after an end", f"{usual_D.sum() / n_begun:.3f}"))
    best_D, best = np.zeros(len(beginnings)), "nothing"
    for separator in SEPARATORS:
        name = repr(separator) if separator else "nothing"
        found_D = _beginnings(case, beginnings, tokenizer.encode(separator) if separator else ())
        rows.append((f"after {name}", f"{found_D.sum() / n_begun:.3f}"))
        if (usual_D - found_D).sum() > best_D.sum():
            best_D, best = usual_D - found_D, name
    if best_D.sum() > 0:
        evidence.append(f"beginnings of texts cost {best_D.sum() / n_begun:.3f} nats a token less after {best}")
    suspicions = case.suspicion(
        "ends",
        (excess_D if excess_D.sum() > 0 else np.zeros(len(excess_D))) + best_D,
        "The end of text is strange to the model: training may have lost its documents' ends.",
        evidence,
        "Make the dataset with --append-eod (its .json says append_eod), and train anew; until then begin texts "
        "as its training did, and leave the ends out of the number.",
    )
    return Evidence("end of text", columns, tuple(rows), tuple(suspicions))


def _beginnings(case: Case, beginnings: Sequence[Sequence[int]], before: Sequence[int]) -> np.ndarray:
    """Nats of all but the first token of each, which nothing predicts where nothing stands before.  Shapes: → [D]."""
    long = [d for d, ids in enumerate(beginnings) if len(ids) > 1]
    scores = case.answers.scores([((*before, beginnings[d][0]), beginnings[d][1:]) for d in long])
    sums_D = np.zeros(len(beginnings))
    sums_D[long] = [-score.logprob for score in scores]
    return sums_D
