"""Penn Treebank as language modelling has it: lower case, numbers as N (Mikolov et al. 2010)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megagpt.evaluate.language import AFTER, BITS, PPL, WORD_PPL, Passage, Windowed, of_passages, words_and_line_ends
from megagpt.evaluate.task import Task, text_of

RULES = [(" (n't|')", r"\1"), (" *\n *", "\n"), ("^ +", ""), (r"(?<= )N(?= |\n)", "1"), ("([$#]) 1", r"\g<1>1")]
"""Patterns, and what comes in their place: what Megatron-LM's replaces, with blanks around numbers kept."""


def detokenised(text: str) -> str:
    """Sentences as they were written, about."""
    for pattern, new in RULES:
        text = re.sub(pattern, new, text)
    return text


def read(paths: Sequence[Path]) -> list[Passage]:
    """The file as one stream."""
    text = text_of(paths[0])
    return [Passage(detokenised(text), text)] if text else []


HOW = "the file as one stream, detokenised by rules of ours; words of the file and an end a line"
ASK = Windowed(HOW, of_passages(words_and_line_ends))
TASKS = (
    Task(
        name="ptb",
        about="the test part of the Penn Treebank",
        protocol=ASK.protocol,
        source="Mikolov et al. 2010; simple-examples.tgz, data/ptb.test.txt",
        files=("ptb/ptb.test.txt",),
        read=read,
        ask=ASK,
        figures=WORD_PPL | PPL | BITS | AFTER,
    ),
)
