"""An example of a task as tokens: what is read, which of it is learned, and the answer that is wanted. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np


class Document(NamedTuple):
    """Tokens that see each other and no others. ids: [n + 1], the inputs and the token after the last of them.

    counts: [n] bool, whether the token after each input is learned.
    """

    ids: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class Example:
    """One line of a file. documents: one, or the two orders of a pair; they share a row.

    answer: the class, or the number, that is wanted at the end of the last one; None where none is known or asked.
    """

    documents: tuple[Document, ...]
    line: int
    answer: float | None = None

    @property
    def n_tokens(self) -> int:
        """Places in a row."""
        return sum(len(document.counts) for document in self.documents)

    @property
    def n_counted(self) -> int:
        """Labels that are learned."""
        return sum(int(document.counts.sum()) for document in self.documents)


@dataclass(frozen=True)
class Examples:
    """What a file holds. notes: what of it was left out or cut, in words."""

    path: str
    found: Sequence[Example]
    notes: Sequence[str] = ()
    sha256: str = ""


@dataclass
class Cuts:
    """Counts what was too long for a row, to say it once. what: each kind of text, and the tokens that it lost."""

    seq_len: int
    n_examples: int = 0
    first_line: int = 0
    what: dict[str, int] = field(default_factory=dict)

    def add(self, line: int, **lost: int) -> None:
        """An example that lost tokens, by kind."""
        if any(lost.values()):
            self.n_examples += 1
            self.first_line = self.first_line or line
            for kind, n in lost.items():
                self.what[kind] = self.what.get(kind, 0) + n

    def notes(self, path: str, n_examples: int) -> list[str]:
        """The line that says it; none where nothing was cut."""
        if not self.n_examples:
            return []
        lost = ", ".join(f"{n:,} tokens of {kind.replace('_', ' ')}" for kind, n in self.what.items() if n)
        return [
            f"{path}: {self.n_examples:,} of {n_examples:,} examples are longer than a row of {self.seq_len} tokens "
            f"(the first in line {self.first_line}): {lost} are cut"
        ]
