"""The optimizers that torch has not, as one torch optimizer, which DeepSpeed hands its masters to.

Some go element by element, so that shards serve. Others need sums over logical tensors, or whole matrices: they take
them together over the ranks that share a tensor. Every rank of these steps the same groups in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megagpt.optim.segments import Segment, Segments


class MeshOptimizer(torch.optim.Optimizer):
    """Steps each group by its `Update` (`group["update"]`); `bind` comes before the first step.

    statistics: key -> name of the parameter -> logical tensor, whole on every rank: what is kept beside the moments.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, settings)
        self.statistics: dict[str, dict[str, Tensor]] = {}
        self._segments: Segments | None = None

    def bind(self, segments: Segments) -> None:
        """Where the parameters lie in what DeepSpeed has put into the groups."""
        self._segments = segments

    @property
    def segments(self) -> Segments:
        """What `bind` was given."""
        assert self._segments is not None
        return self._segments

    def segments_of(self, masters: list[Tensor]) -> list[Segment]:
        """The parameters' segments in these masters, the same list on every rank that shares them."""
        return [segment for master in masters for segment in self.segments.masters[master]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of the groups that are there now; of nothing where there are no gradients.

        Comm: that of the updates.
        """
        assert closure is None
        for group in self.param_groups:
            masters = [m for m in group["params"] if m.grad is not None]
            for master in masters:
                self.state[master]["step"] += 1
            group["update"].step(self, masters, group)
