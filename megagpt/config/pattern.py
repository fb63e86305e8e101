"""Which keys the queries of a layer may attend, as it is written in a configuration: window:256. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.errors import require
from megagpt.model.attention.patterns import PATTERNS, PatternRule

_KEY = "model.attention"


@dataclass(frozen=True)
class Pattern:
    """A kind of PATTERNS, and its numbers."""

    kind: str = "dense"
    numbers: tuple[int, ...] = ()

    @property
    def rule(self) -> PatternRule:
        """What it means."""
        return PATTERNS[self.kind](self.numbers)

    @staticmethod
    def parse(text: str) -> Pattern:
        """From "window:256".  Raises UserError for anything that is none of the forms."""
        kind, *numbers = text.split(":")
        rule, got = PATTERNS.get(kind), f"{_KEY}={text!r}"
        ok = rule is not None and len(numbers) == rule.n_numbers and all(n.isdecimal() and len(n) < 10 for n in numbers)
        *forms, last = [rule.form for rule in PATTERNS.values()]
        require(ok, got, "is no pattern", f"use {', '.join(forms)} or {last}", _KEY)
        pattern = Pattern(kind, tuple(map(int, numbers)))
        positive = all(n > 0 for n in pattern.numbers[: pattern.rule.n_positive])
        require(positive, got, "holds a 0", "use 1 or more", _KEY)
        return pattern

    def require_fits(self, seq_len: int) -> None:
        """Raises UserError where the pattern reaches further than the context."""
        reach = self.rule.reach
        require(
            reach <= seq_len,
            f"model.attention={self} with model.seq_len={seq_len}",
            f"reaches {reach} tokens, further than the context",
            "use a smaller one, dense, or a larger --seq-len",
            _KEY,
            "model.seq_len",
        )

    def __str__(self) -> str:
        return ":".join([self.kind, *map(str, self.numbers)])
