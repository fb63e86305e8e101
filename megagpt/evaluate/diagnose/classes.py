"""Loss by class of token."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from megagpt.evaluate.diagnose.evidence import Case, Evidence

MARKUP = frozenset("<>{}[]|=&;@#\\/_*~^`$")
CLASSES: dict[str, Callable[[str], bool]] = {
    "digits": lambda text: any(c.isdigit() for c in text),
    "markup": lambda text: any(c in MARKUP for c in text),
    "non-ASCII": lambda text: not text.isascii(),
    "capitals": lambda text: any(c.isupper() for c in text),
    "other": lambda text: True,
}
"""By the text of a token; the first that holds counts. Blanks are told before, by what they stand beside."""


def classes(case: Case) -> Evidence:
    """Suspects each class of what it costs beyond its tokens' shares of the texts."""
    reading = case.reading
    names_N = classes_of(case)
    rows, suspicions = [], []
    total = reading.losses.sum()
    for name in ("runs of blanks", "end of text", *CLASSES):
        of_N = names_N == name
        if not of_N.any():
            continue
        loss, alone = reading.losses[of_N].mean(), reading.surprise[of_N].mean()
        share = f"{reading.losses[of_N].sum() / total:.1%}"
        rows.append((name, f"{of_N.mean():.2%}", f"{loss:.3f}", f"{alone:.3f}", share))
        if name in ("other", "end of text"):
            continue
        suspicions += case.suspicion(
            "classes",
            reading.by_document(np.where(of_N, reading.losses - reading.surprise, 0)),
            f"The class “{name}”: the model does worse on it than without any context.",
            [f"{of_N.mean():.2%} of the text, {loss:.2f} nats each; their share of the text alone: {alone:.2f}"],
            "Compare such places of the training text with those of the evaluation: what was stripped or normalised?",
        )
    columns = ("class", "share of text", "nats", "by share alone", "share of loss")
    return Evidence("loss by class of token", columns, tuple(rows), tuple(suspicions))


def classes_of(case: Case) -> np.ndarray:
    """Of each token.  Shapes: → [N], names."""
    reading, tokenizer = case.reading, case.answers.tokenizer
    distinct, where_N = np.unique(reading.ids, return_inverse=True)
    texts = [tokenizer.decode([int(i)]) for i in distinct]
    names = [next(name for name, holds in CLASSES.items() if holds(text)) for text in texts]
    blank_N = np.array([text.isspace() for text in texts])[where_N]
    long_N = np.array([text.isspace() and len(text) > 1 for text in texts])[where_N]
    follows_N = np.r_[False, blank_N[:-1] & (reading.documents[1:] == reading.documents[:-1])]
    names_N = np.array(names, dtype=object)[where_N]
    names_N[long_N | (blank_N & follows_N)] = "runs of blanks"
    names_N[reading.ids == tokenizer.eod] = "end of text"
    return names_N
