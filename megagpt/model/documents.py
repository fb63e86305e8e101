"""Several documents side by side in a row: where each token stands in its own, and that it sees no other.

Shapes: B rows, T tokens of each.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeVar

from torch import Tensor

M = TypeVar("M")


class Documents:
    """The documents of a micro-batch of packed rows. All follows from the positions, which begin anew with each.

    kept: masks that layers share, by what they were made for.
    """

    def __init__(self, positions_BT: Tensor) -> None:
        self.positions_BT = positions_BT
        self._kept: dict[object, object] = {}

    @cached_property
    def numbers_BT(self) -> Tensor:  # noqa: N802
        """Which document of its row a token is of."""
        return (self.positions_BT == 0).cumsum(1)

    def kept(self, key: object, make: Callable[[], M]) -> M:
        """What was made for a key before, or is now."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]  # type: ignore[return-value]
