"""Which keys a query may attend: what a kind of pattern declares, and its predicate. Dense attention is the plain case.

A kind is one file beside this one and a line in `__init__.py`. No torch to read what they declare.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    Predicate = Callable[[Tensor, Tensor], Tensor]


class PatternRule:
    """Dense: a query at position t attends all keys s <= t; kinds override what differs.

    form: as it is written.  n_numbers: numbers in it, of which the first n_positive must be above 0.
    needs_mask: whether it takes a mask beside causality and a window.
    """

    form: ClassVar[str] = "dense"
    n_numbers: ClassVar[int] = 0
    n_positive: ClassVar[int] = 0
    needs_mask: ClassVar[bool] = False

    def __init__(self, numbers: tuple[int, ...] = ()) -> None:
        self.numbers = numbers

    @property
    def reach(self) -> int:
        """Tokens that a context must have for the pattern to make sense."""
        return self.numbers[0] if self.numbers else 0

    @property
    def window(self) -> int | None:
        """How far back a query sees, its own position counted, where that says it all beside causality."""
        return None

    def attended_pairs(self, seq_len: int) -> int:
        """Pairs of a query and a key that it may attend, itself included, in a sample of seq_len tokens."""
        return triangle(seq_len)

    def predicate(self, layer: int, seq_len: int, device: torch.device) -> Predicate:
        """Whether queries at positions q attend keys at positions k: bool of their broadcast shape."""
        return lambda q, k: k <= q


def triangle(n: int) -> int:
    """1 + 2 + … + n."""
    return n * (n + 1) // 2
