"""Adam and AdamW: torch's own, fused, or apex's; and AdamW's step for what another optimizer leaves to it.

Source: Kingma & Ba 2015; Loshchilov & Hutter 2019.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any, ClassVar

from megagpt.errors import UserError
from megagpt.optim.update import EXP_AVG, EXP_AVG_SQ, Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megagpt.config import OptimConfig
    from megagpt.optim.mesh_optimizer import MeshOptimizer


class AdamW(Update):
    """Weight decay beside the gradient's step."""

    name = "adam"
    moments = (EXP_AVG, EXP_AVG_SQ)
    decoupled: ClassVar[bool] = True

    def build(
        self, groups: list[dict[str, Any]], settings: dict[str, Any], on_gpu: bool
    ) -> tuple[torch.optim.Optimizer, str]:
        import torch  # computes: what is declared is read without it

        # NVIDIA's apex has apex.optimizers; the package called apex on the registry is another project.
        if on_gpu and importlib.util.find_spec("apex") and importlib.util.find_spec("apex.optimizers"):
            from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]  # built from source

            for group in groups:
                group["step"] = 0  # it counts here, and would begin anew where a run goes on
            return FusedAdam(groups, adam_w_mode=self.decoupled, **settings), "apex FusedAdam"
        reason = "apex is not installed" if on_gpu else "no GPU for apex"
        of_torch = torch.optim.AdamW if self.decoupled else torch.optim.Adam
        return of_torch(groups, fused=True, **settings), f"torch {of_torch.__name__}, fused ({reason})"

    def step(self, optimizer: MeshOptimizer, masters: list[Tensor], group: dict[str, Any]) -> None:
        from torch.optim.adamw import adamw  # likewise

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

    decoupled = False

    def check(self, optim: OptimConfig) -> None:
        if optim.weight_decay_times != "lr":
            raise UserError(
                f"optim.weight_decay_times={optim.weight_decay_times} with optim.optimizer=adam",
                "cannot work: its decay is part of the gradient",
                "use adamw, or weight_decay_times lr",
                ("optim.weight_decay_times", "optim.optimizer"),
            )
