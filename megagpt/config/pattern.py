"""Which keys a query may attend, beside causality: one description for masks, kernels, FLOPs and memory. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from megagpt.config.checks import require

Kind = Literal["dense", "window", "strided", "bigbird"]
_NUMBERS = {"dense": 0, "window": 1, "strided": 1, "bigbird": 4}
_KEY = "model.attention"
_FORMS = "dense, window:W, strided:S or bigbird:B:W:G:R"


@dataclass(frozen=True)
class Pattern:
    """A query at position t attends keys s <= t for which, by kind:

    dense: all.  window W: t - s < W (Beltagy et al. 2020; Mistral).
    strided S: t - s < S or (t - s) % S == 0 (Child et al. 2019, section 4.2, both heads' sets in one).
    bigbird B W G R, in blocks of B positions: the query's block and the W - 1 before it, the first G, and R others
    before these, drawn by layer and block (Zaheer et al. 2020, section 2).
    """

    kind: Kind = "dense"
    numbers: tuple[int, ...] = ()

    @staticmethod
    def parse(text: str) -> Pattern:
        """From "window:256".  Raises UserError for anything that is none of the forms."""
        kind, *numbers = text.split(":")
        known = kind in get_args(Kind)
        ok = known and len(numbers) == _NUMBERS[kind] and all(n.isdecimal() and len(n) < 10 for n in numbers)
        got = f"{_KEY}={text!r}"
        require(ok, got, "is no pattern", f"use {_FORMS}", _KEY)
        pattern = Pattern(kind, tuple(map(int, numbers)))  # type: ignore[arg-type]
        first = 2 if kind == "bigbird" else len(numbers)  # there may be no global and no random blocks
        require(all(n > 0 for n in pattern.numbers[:first]), got, "holds a 0", "use 1 or more", _KEY)
        return pattern

    def require_fits(self, seq_len: int) -> None:
        """Raises UserError where the pattern reaches further than the context."""
        if self.kind == "dense":
            return
        reach = self.numbers[0] * (sum(self.numbers[1:]) if self.kind == "bigbird" else 1)
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
