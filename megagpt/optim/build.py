"""The optimizer of a run, over groups of parameters that are stepped alike."""

from __future__ import annotations

from typing import Any

import torch

from megagpt.config import OptimConfig, RunConfig
from megagpt.optim import OPTIMIZERS
from megagpt.optim.depth import rate_of
from megagpt.optim.mesh_optimizer import MeshOptimizer
from megagpt.optim.rules import Rule, rule_of
from megagpt.parallel.parameter import Named


def build_optimizer(parameters: list[Named], run: RunConfig) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer, and what it is called in the log.

    The rate starts at 0 and is set before every step (`set_rate`), so that nothing moves before the schedule says so.
    """
    optim, groups = run.optim, _groups(parameters, run)
    settings: dict[str, Any] = {"lr": 0.0, "betas": (optim.beta1, optim.beta2), "eps": optim.eps}
    for group in groups:
        settings |= group["update"].settings(run)
    on_gpu = parameters[0].parameter.is_cuda or torch.cuda.is_available()
    of_torch = OPTIMIZERS[optim.optimizer].build(groups, settings, on_gpu)
    return of_torch or (MeshOptimizer(groups, **settings), f"{optim.optimizer} over logical tensors")


def _groups(parameters: list[Named], run: RunConfig) -> list[dict[str, Any]]:
    """Parameters of one rule and one share of the rate each, those that decay first; the fastest first.

    "decay" is the configured one and "rate" that share, see `set_rate`.
    """
    alike: dict[tuple[Rule, float], list[Named]] = {}
    for named in parameters:
        alike.setdefault((rule_of(named.declared, run.optim), rate_of(named.name, run)), []).append(named)
    groups = []
    for rule, rate in sorted(alike, key=lambda kind: (not kind[0].decays, kind[0].update.name, -kind[1])):
        decay = run.optim.weight_decay if rule.decays and rate > 0 else 0.0
        members = [named.parameter for named in alike[rule, rate]]
        group = {"params": members, "weight_decay": decay, "decay": decay, "rate": rate, "update": rule.update}
        groups.append(group)
    return groups


def freeze(parameters: list[Named], run: RunConfig) -> None:
    """Give what is frozen a gradient of zeros: it moves in no optimizer, and counts nothing in the norm.

    It takes part in all else as every parameter does, so that sharding and checkpoints need not know.
    """
    for named in parameters:
        if rate_of(named.name, run) == 0.0:
            named.parameter.register_hook(torch.zeros_like)


def set_rate(optimizer: torch.optim.Optimizer, lr: float, config: OptimConfig) -> None:
    """Set the learning rate of the next step, and the decay that goes with it. optimizer: torch's or DeepSpeed's."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]
        if config.weight_decay_times == "lr_squared":  # all that decouple decay multiply it by the rate once
            group["weight_decay"] = group["decay"] * lr * group["rate"]
