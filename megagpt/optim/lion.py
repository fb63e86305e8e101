"""Lion: the sign of an interpolated momentum (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms")."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from megagpt.optim.update import EXP_AVG, Update

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.optim.mesh_optimizer import MeshOptimizer


class Lion(Update):
    """Element by element, so that shards serve.  Source: program 1."""

    name = "lion"
    moments = (EXP_AVG,)

    def step(self, optimizer: MeshOptimizer, masters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for weight in masters:
            momentum = optimizer.state[weight][EXP_AVG]
            assert weight.grad is not None
            direction = momentum.lerp(weight.grad, 1 - beta1).sign_()
            momentum.lerp_(weight.grad, 1 - beta2)
            weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
