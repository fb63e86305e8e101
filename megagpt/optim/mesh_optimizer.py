"""Lion, Adafactor and Muon as one torch optimizer, which DeepSpeed hands its masters to.

Lion goes element by element, so that shards serve. Adafactor needs sums over logical tensors, Muon whole matrices: both
take them together over the ranks that share a tensor. Every rank of these steps the same groups in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megagpt.optim.adafactor import adafactor
from megagpt.optim.muon import muon
from megagpt.train.step.segments import Segment, Segments


class MeshOptimizer(torch.optim.Optimizer):
    """Steps each group by the rule that it names (`group["update"]`); `bind` comes before the first step.

    statistics: key -> name of the parameter -> logical tensor, whole on every rank: what is kept beside the moments.
    """

    def __init__(self, groups: list[dict[str, Any]], **settings: Any) -> None:
        super().__init__(groups, settings)
        self.statistics: dict[str, dict[str, Tensor]] = {}
        self._segments: Segments | None = None

    def bind(self, segments: Segments) -> None:
        """Where the parameters lie in what DeepSpeed has put into the groups."""
        self._segments = segments

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of the groups that are there now; of nothing where there are no gradients.

        Comm: for Adafactor and Muon, collectives over the data and model axes.
        """
        assert closure is None and self._segments is not None
        for group in self.param_groups:
            masters = [m for m in group["params"] if m.grad is not None]
            for master in masters:
                self.state[master]["step"] += 1
            if group["update"] == "adam":
                self._adam(masters, group)
            elif group["update"] == "lion":
                for master in masters:
                    _lion(master, self.state[master]["exp_avg"], group)
            else:
                segments = [segment for master in masters for segment in self._segments.masters[master]]
                self._together(segments, group)

    def _together(self, segments: list[Segment], group: dict[str, Any]) -> None:
        assert self._segments is not None
        if group["update"] == "muon":
            muon(self._segments, segments, self.state, group)
        else:
            adafactor(self._segments, segments, self.state, self.statistics, group)

    def _adam(self, masters: list[Tensor], group: dict[str, Any]) -> None:
        """AdamW, for what Muon is not for."""
        states = [self.state[master] for master in masters]
        grads = [master.grad for master in masters if master.grad is not None]
        adamw(
            masters,
            grads,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            # The fused kernel counts by itself.
            [state["step"] - 1 for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _lion(weight: Tensor, momentum: Tensor, group: dict[str, Any]) -> None:
    """Source: Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", program 1."""
    assert weight.grad is not None
    beta1, beta2 = group["betas"]
    direction = momentum.lerp(weight.grad, 1 - beta1).sign_()
    momentum.lerp_(weight.grad, 1 - beta2)
    weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
