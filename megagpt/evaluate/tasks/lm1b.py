"""The one billion word benchmark, 1BW: sentences of news, shuffled (Chelba et al. 2013)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megagpt.evaluate.language import AFTER, BITS, PPL, WORD_PPL, Passage, Windowed, of_passages, words_and_line_ends
from megagpt.evaluate.task import Task, text_of

RULES = [
    (r" (n't|'(?:s|m|d|re|ve|ll))\b", r"\1"),
    (r" ([.,:;?!%)\]])", r"\1"),
    (r"([(\[$#]) ", r"\1"),
    (r'" ([^"]*?) "', r'"\1"'),
]
"""Patterns, and what comes in their place."""


def detokenised(text: str) -> str:
    """A sentence as it was written, about."""
    for pattern, new in RULES:
        text = re.sub(pattern, new, text)
    return text


def read(paths: Sequence[Path]) -> list[Passage]:
    """A sentence each, with the end of its line, which ends it."""
    lines = [line + "\n" for line in text_of(paths[0]).split("\n") if line.strip()]
    return [Passage(detokenised(line), line) for line in lines]


HOW = (
    "each sentence with its own context, detokenised by rules of ours (the GPT-2 paper does not give its own); "
    "words of the file and an end a sentence"
)
ASK = Windowed(HOW, of_passages(words_and_line_ends))
PLACE = "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050"
TASKS = (
    Task(
        name="lm1b",
        about="sentences of the one billion word benchmark",
        protocol=ASK.protocol,
        source=f"Chelba et al. 2013; 1-billion-word-language-modeling-benchmark-r13output.tar.gz, {PLACE}",
        files=("lm1b/news.en.heldout-00000-of-00050",),
        read=read,
        ask=ASK,
        figures=WORD_PPL | PPL | BITS | AFTER,
    ),
)
