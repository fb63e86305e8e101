"""One axis of the process mesh, as a layer sees it."""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Axis:
    """The processes that differ only in one mesh coordinate.

    group: their process group; None where torch.distributed was never started.
    With size 1 all collectives are identities.
    rank: this process's coordinate on the axis.  size: number of processes on it.
    """

    group: ProcessGroup | None
    rank: int
    size: int


SINGLE = Axis(group=None, rank=0, size=1)
