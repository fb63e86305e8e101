"""The optimizer of a run, over groups of parameters that are stepped alike."""

from __future__ import annotations

from typing import Any

import torch

from megagpt.config import OptimConfig, RunConfig
from megagpt.optim import OPTIMIZERS
from megagpt.optim.mesh_optimizer import MeshOptimizer
from megagpt.optim.rules import Rule, rule_of
from megagpt.parallel.parameter import Named


def build_optimizer(parameters: list[Named], run: RunConfig) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer, and what it is called in the log.

    The rate starts at 0 and is set before every step (`set_rate`), so that nothing moves before the schedule says so.
    """
    optim, groups = run.optim, _groups(parameters, run.optim)
    settings: dict[str, Any] = {"lr": 0.0, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    for group in groups:
        settings |= group["update"].settings(run)
    on_gpu = parameters[0].parameter.is_cuda or torch.cuda.is_available()
    of_torch = OPTIMIZERS[optim.optimizer].build(groups, settings, on_gpu)
    return of_torch or (MeshOptimizer(groups, **settings), f"{optim.optimizer} over logical tensors")


def _groups(parameters: list[Named], optim: OptimConfig) -> list[dict[str, Any]]:
    """Parameters of one rule each, those that decay first; "decay" is the configured one, see `set_rate`."""
    of_rule: dict[Rule, list[Named]] = {}
    for named in parameters:
        of_rule.setdefault(rule_of(named.declared, optim), []).append(named)
    groups = []
    for rule in sorted(of_rule, key=lambda rule: (not rule.decays, rule.update.name)):
        decay = optim.weight_decay if rule.decays else 0.0
        members = [named.parameter for named in of_rule[rule]]
        groups.append({"params": members, "weight_decay": decay, "decay": decay, "update": rule.update})
    return groups


def set_rate(optimizer: torch.optim.Optimizer, lr: float, config: OptimConfig) -> None:
    """Set the learning rate of the next step, and the decay that goes with it. optimizer: torch's or DeepSpeed's."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if config.weight_decay_times == "lr_squared":  # all that decouple decay multiply it by the rate once
            group["weight_decay"] = group["decay"] * lr
