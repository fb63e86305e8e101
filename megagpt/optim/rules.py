"""What steps each parameter of a run, and what is kept of it; a function of what its layer declares. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.config import OptimConfig
from megagpt.inventory.parameter import AVERAGE, Parameter
from megagpt.optim import OPTIMIZERS
from megagpt.optim.update import Update


@dataclass(frozen=True)
class Rule:
    """moments: keys of the fp32 tensors of the parameter's own shape that are kept, the average included. statistics:
    keys of what is kept beside them, whole on every rank. decays: whether weight decay applies.
    """

    update: Update
    moments: tuple[str, ...]
    statistics: tuple[str, ...]
    decays: bool


def rule_of(parameter: Parameter, optim: OptimConfig) -> Rule:
    """The rule of one parameter."""
    update = OPTIMIZERS[optim.optimizer].of(parameter)
    average = (AVERAGE,) if optim.ema_decay is not None else ()
    return Rule(update, (*update.moments, *average), update.statistics, parameter.decays)


def kept_by_optimizer(parameter: Parameter, optim: OptimConfig) -> int:
    """fp32 numbers an element; means over rows and columns are too few to count."""
    return len(rule_of(parameter, optim).moments)
