"""The optimizer over groups of parameters that are stepped alike."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from megagpt.config import OptimConfig, RunConfig
from megagpt.optim import OPTIMIZERS
from megagpt.optim.mesh_optimizer import MeshOptimizer
from megagpt.optim.rules import Rule, rule_of
from megagpt.parallel.parameter import Named


def build_optimizer(parameters: list[Named], run: RunConfig) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer over groups of parameters that are stepped alike, and what it is called in the log.

    The rate starts at 0 and is set before every step (`set_rate`), so that nothing moves before the schedule says so.
    """
    config = run.optim
    of_rule: dict[Rule, list[Named]] = {}
    for named in parameters:
        of_rule.setdefault(rule_of(named.declared, config), []).append(named)
    decaying_first = sorted(of_rule, key=lambda rule: (not rule.decays, rule.update.name))
    groups: list[dict[str, Any]] = [
        {
            "params": [named.parameter for named in of_rule[rule]],
            "weight_decay": config.weight_decay if rule.decays else 0.0,
            "decay": config.weight_decay if rule.decays else 0.0,
            "update": rule.update,
        }
        for rule in decaying_first
    ]
    settings: dict[str, Any] = {"lr": 0.0, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if not OPTIMIZERS[config.optimizer].by_torch:
        for group in groups:
            settings |= group["update"].settings(run)
        return MeshOptimizer(groups, **settings), f"{config.optimizer} over logical tensors"
    decoupled = config.optimizer == "adamw"
    on_gpu = parameters[0].parameter.is_cuda or torch.cuda.is_available()
    # NVIDIA's apex has apex.optimizers; the package called apex on the registry is another project.
    if on_gpu and importlib.util.find_spec("apex") and importlib.util.find_spec("apex.optimizers"):
        from apex.optimizers import FusedAdam  # pyright: ignore[reportMissingImports]  # built from source

        for group in groups:
            group["step"] = 0  # it counts here, and would begin anew where a run goes on
        return FusedAdam(groups, adam_w_mode=decoupled, **settings), "apex FusedAdam"
    reason = "apex is not installed" if on_gpu else "no GPU for apex"
    of_torch = torch.optim.AdamW if decoupled else torch.optim.Adam
    return of_torch(groups, fused=True, **settings), f"torch {of_torch.__name__}, fused ({reason})"


def set_rate(optimizer: torch.optim.Optimizer, lr: float, config: OptimConfig) -> None:
    """Set the learning rate of the next step, and the decay that goes with it. optimizer: torch's or DeepSpeed's."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if config.weight_decay_times == "lr_squared":  # all that decouple decay multiply it by the rate once
            group["weight_decay"] = group["decay"] * lr
