"""The same text written otherwise: which form does the model like better.

A form is a function of the text that loses none of what it says, so that the log-probabilities of whole texts compare.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

import numpy as np

from megagpt.evaluate.diagnose.evidence import Case, Evidence
from megagpt.evaluate.diagnose.reading import read


def detokenised(text: str) -> str:
    """WikiText's forms undone, as the detokenizer of Megatron-LM does (tasks/zeroshot_gpt/detokenizer.py)."""
    text = re.sub(r" @(.)@ ", r"\1", text)
    text = re.sub(r" ([,.:;?!)\]%])", r"\1", text)
    text = re.sub(r"([(\[]) ", r"\1", text)
    text = re.sub(r" (n't|'(?:s|t|re|ve|ll|d|m)\b)", r"\1", text)
    text = re.sub(r'" ([^"]*) "', r'"\1"', text)
    text = re.sub(r"^ (?:= )+(.*?)(?: =)+ \n ?", r"\1\n", text, flags=re.MULTILINE)
    return re.sub(r" +\n ", "\n", text)


def tokenised(text: str) -> str:
    """As WikiText is written."""
    text = re.sub(r"(?<=\w)([-,.])(?=\w)", r" @\1@ ", text)
    text = re.sub(r"(?<=[\w)\]])([,.:;?!)\]])(?=[\s,.:;?!)\]]|$)", r" \1", text)
    text = re.sub(r"([(\[])(?=\w)", r"\1 ", text)
    return re.sub(r"(?<=\w)('(?:s|re|ve|ll|d|m)\b)", r" \1", text)


CURLY = "\u2018\u2019\u201c\u201d"
FORMS: dict[str, Callable[[str], str]] = {
    "detokenised (“a , b” → “a, b”)": detokenised,
    "tokenised (“a, b” → “a , b”)": tokenised,
    "line ends as \\n": lambda text: text.replace("\r\n", "\n"),
    "characters composed (NFC)": lambda text: unicodedata.normalize("NFC", text),
    "quotes straight": lambda text: text.translate(str.maketrans(CURLY, "''\"\"")),
}


def detokenise(case: Case) -> Evidence:
    """Suspects the form of the texts of what they cost more, as a whole, than in the form that costs the least."""
    reading, tokenizer = case.reading, case.answers.tokenizer
    usual_D = reading.by_document(reading.losses)
    rows = [("as it is", f"{reading.loss:.3f}")]
    best, gain_D, shown = "", np.zeros(len(case.texts)), ""
    for name, form in FORMS.items():
        texts = [form(text) for text in case.texts]
        changed = [d for d, (new, old) in enumerate(zip(texts, case.texts, strict=True)) if new != old and new]
        if not changed:
            continue
        end = () if tokenizer.eod is None else (tokenizer.eod,)
        there = read(case.answers, [(*tokenizer.encode(texts[d]), *end) for d in changed])
        found_D = np.zeros(len(texts))
        found_D[changed] = usual_D[changed] - there.by_document(there.losses)
        rows.append((name, f"{reading.loss - found_D.sum() / len(reading.ids):.3f}"))
        if found_D.sum() > gain_D.sum():
            best, gain_D, shown = name, found_D, texts[int(found_D.argmax())][:50]
    suspicions = case.suspicion(
        "detokenise",
        gain_D,
        f"The texts are written otherwise than the training's: {best} the model likes them better.",
        [f"{(gain_D > 0).sum()} of {len(gain_D)} documents cost less so; one: {shown!r}"],
        "Evaluate with the detokeniser that belongs to the data set, count words and bytes as its protocol says, "
        "and name it beside the number.",
    )
    columns = ("form of the text", "nats per token of the first")
    return Evidence("the same text in other forms", columns, tuple(rows), tuple(suspicions))
