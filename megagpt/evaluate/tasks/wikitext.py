"""WikiText-2 and WikiText-103: articles of Wikipedia (Merity et al. 2016)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from megagpt.evaluate.language import AFTER, BITS, PPL, WORD_PPL, Passage, Windowed, of_passages
from megagpt.evaluate.task import Task, text_of

RULES = [
    ("s '", "s'"),
    (r"/' [0-9]/", "/'[0-9]/"),  # theirs: a pattern taken as text
    *[(f" @{mark}@ ", mark) for mark in ("-", ",")],
    (r" @\.@ ", "."),
    *[(f" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"],
    *[(rf"\{a}\s*([^\{b}]*?)\s*\{b}", rf"{a}\1{b}") for a, b in ("()", "[]", "{}", '""', "''")],
    *[(" ".join("=" * n), "=" * n) for n in (4, 3, 2)],
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
]
"""What lm-eval's wikitext replaces, in its order: patterns, and what comes in their place."""


def detokenised(text: str) -> str:
    """An article as it was written, about."""
    for pattern, new in RULES:
        text = re.sub(pattern, new, text)
    return text


def articles(paths: Sequence[Path]) -> list[Passage]:
    """A line that is a title of the first level begins one."""
    found: list[list[str]] = [[]]
    for line in text_of(paths[0]).split("\n"):
        if re.fullmatch(r"= (?!= ).*(?<! =) =", line.strip()):
            found.append([])
        found[-1].append(line)
    texts = ["\n".join(lines) for lines in found]
    return [Passage(detokenised(text), text) for text in texts if text.strip()]


def stream(paths: Sequence[Path]) -> list[Passage]:
    """As transformers' guide to perplexity has it: an empty line after each line."""
    text = text_of(paths[0])
    lines = text.removesuffix("\n").split("\n")
    return [Passage("\n\n".join(line + "\n" if line.strip() else "" for line in lines), text)] if text else []


def parts_between_blanks(text: str) -> int:
    """As lm-eval counts words: the blanks at both ends part an empty one off."""
    return len(re.split(r"\s+", text))


def tasks(number: int, archive: str) -> tuple[Task, Task]:
    """By article, detokenised; and the file as it is."""
    how = "each article with its own context, detokenised; words and bytes of the file; as lm-eval's wikitext"
    pages = Windowed(how, of_passages(parts_between_blanks))
    whole = Windowed("the file as one stream, not detokenised, empty lines as in transformers' guide", of_passages())
    source, files = f"Merity et al. 2016; {archive}", (f"wikitext-{number}/wiki.test.raw",)
    about = f"the test articles of WikiText-{number}"
    return (
        Task(
            name=f"wikitext{number}",
            about=about,
            protocol=pages.protocol,
            source=source,
            files=files,
            read=articles,
            ask=pages,
            figures=WORD_PPL | PPL | BITS | AFTER,
        ),
        Task(
            name=f"wikitext{number}_stream",
            about=about,
            protocol=whole.protocol,
            source=source,
            files=files,
            read=stream,
            ask=whole,
            figures=PPL | WORD_PPL | BITS,
        ),
    )


TASKS = (*tasks(2, "wikitext-2-raw-v1.zip"), *tasks(103, "wikitext-103-raw-v1.zip"))
