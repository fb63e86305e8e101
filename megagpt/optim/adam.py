"""Adam and AdamW: torch's own, fused, or apex's; and AdamW's step for what another optimizer leaves to it.

Source: Kingma & Ba 2015; Loshchilov & Hutter 2019.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megagpt.errors import require
from megagpt.optim.update import EXP_AVG, EXP_AVG_SQ, Update

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.config import OptimConfig
    from megagpt.optim.mesh_optimizer import MeshOptimizer


class AdamW(Update):
    """Weight decay beside the gradient's step."""

    name = "adam"
    moments = (EXP_AVG, EXP_AVG_SQ)
    by_torch = True

    def step(self, optimizer: MeshOptimizer, masters: list[Tensor], group: dict[str, Any]) -> None:
        from torch.optim.adamw import adamw  # computes: what is declared is read without torch

        states = [optimizer.state[master] for master in masters]
        adamw(
            masters,
            [master.grad for master in masters if master.grad is not None],
            [state[EXP_AVG] for state in states],
            [state[EXP_AVG_SQ] for state in states],
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


class Adam(AdamW):
    """Weight decay as a part of the gradient."""

    def check(self, optim: OptimConfig) -> None:
        require(
            optim.weight_decay_times == "lr",
            f"optim.weight_decay_times={optim.weight_decay_times} with optim.optimizer=adam",
            "cannot work: its decay is part of the gradient",
            "use adamw, or weight_decay_times lr",
            *("optim.weight_decay_times", "optim.optimizer"),
        )
