"""AdEMAMix: Adam with a second, much slower average of the gradient beside the first.

Source: Pagliardini, Ablin & Grangier 2024 (The AdEMAMix Optimizer: Better, Faster, Older), algorithm 1 and section 3.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megagpt.errors import require
from megagpt.optim.update import EXP_AVG, EXP_AVG_SQ, Update

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.config import OptimConfig, RunConfig
    from megagpt.optim.mesh_optimizer import MeshOptimizer

SLOW = "exp_avg_slow"
SLOW_BETA, SLOW_WEIGHT = 0.9999, 8.0  # beta3 and alpha, as the paper trains its language models


class AdEMAMix(Update):
    """Element by element, so that shards serve. Both slow numbers rise over the run, so that it starts as AdamW."""

    name = "ademamix"
    moments = (EXP_AVG, EXP_AVG_SQ, SLOW)

    def check(self, optim: OptimConfig) -> None:
        require(
            0 < optim.beta1 < SLOW_BETA,
            f"optim.beta1={optim.beta1} with optim.optimizer=ademamix",
            f"must lie between 0 and the slow average's {SLOW_BETA}",
            "use 0.9",
            *("optim.beta1", "optim.optimizer"),
        )

    def settings(self, run: RunConfig) -> dict[str, Any]:
        return {"slow_warmup_steps": run.train.train_steps}

    def step(self, optimizer: MeshOptimizer, masters: list[Tensor], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        for weight in masters:
            state, gradient = optimizer.state[weight], weight.grad
            assert gradient is not None
            n_steps = float(state["step"])
            weight_of_slow, beta3 = slow_numbers(n_steps / group["slow_warmup_steps"], beta1)
            state[EXP_AVG].lerp_(gradient, 1 - beta1)
            state[SLOW].lerp_(gradient, 1 - beta3)
            state[EXP_AVG_SQ].lerp_(gradient.square(), 1 - beta2)
            root = (state[EXP_AVG_SQ] / (1 - beta2**n_steps)).sqrt_().add_(group["eps"])
            direction = (state[EXP_AVG] / (1 - beta1**n_steps)).add_(state[SLOW], alpha=weight_of_slow).div_(root)
            weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(direction, alpha=group["lr"])


def slow_numbers(share: float, beta1: float) -> tuple[float, float]:
    """alpha and beta3 after this share of the run: alpha rises by a line, beta3 so that its half-life does.

    Source: section 3, "schedulers".
    """
    fast, slow = math.log(beta1), math.log(SLOW_BETA)
    beta3 = math.exp(fast * slow / ((1 - share) * slow + share * fast)) if share < 1 else SLOW_BETA
    return min(share, 1.0) * SLOW_WEIGHT, min(beta3, SLOW_BETA)
