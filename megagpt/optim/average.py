"""An exponential moving average of the fp32 weights, where they are: shards of ZeRO and of tensor parallelism alike."""

from __future__ import annotations

import torch

from megagpt.inventory.parameter import AVERAGE


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """From now on let every step of the optimizer move the average; one that moves no weight does not count.

    The state has a place for the average, see `Masters`. Comm: none.
    Source: Polyak & Juditsky 1992; with exponential weights as in Tarvainen & Valpola 2017.
    """

    @torch.no_grad()
    def move(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        masters = [m for group in optimizer.param_groups for m in group["params"] if m.grad is not None]
        if masters:
            torch._foreach_lerp_([optimizer.state[m][AVERAGE] for m in masters], masters, 1 - decay)

    optimizer.register_step_post_hook(move)
