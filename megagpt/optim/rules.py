"""What steps each parameter of a run, and what is kept of it; a function of what its layer declares. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.inventory.parameter import AVERAGE
from megagpt.optim import OPTIMIZERS
from megagpt.optim.adafactor import COLUMNS, ROWS
from megagpt.optim.update import EXP_AVG_SQ

if TYPE_CHECKING:
    from megagpt.config import OptimConfig
    from megagpt.inventory.parameter import Parameter, Shape
    from megagpt.optim.update import Update

SQUARES = frozenset({EXP_AVG_SQ, ROWS, COLUMNS})
"""Keys of what is never negative: means of squared gradients, of which roots are taken."""


@dataclass(frozen=True)
class Rule:
    """What steps a parameter, and with which decay; parameters of one rule make up a group of the optimizer.

    moments: keys of the fp32 tensors of the parameter's own shape that are kept, the average included.
    statistics: keys of what is kept beside them, whole on every rank.
    decays: whether weight decay applies.
    """

    update: Update
    moments: tuple[str, ...]
    statistics: tuple[str, ...]
    decays: bool


def rule_of(parameter: Parameter, optim: OptimConfig) -> Rule:
    """The rule of one parameter."""
    update = OPTIMIZERS[optim.optimizer].of(parameter)
    average = (AVERAGE,) if optim.ema_decay is not None else ()
    return Rule(update, (*update.moments, *average), tuple(update.statistics), parameter.decays)


def kept_by_optimizer(parameter: Parameter, optim: OptimConfig) -> int:
    """fp32 numbers that are kept for each element of a parameter; statistics are too few to count."""
    return len(rule_of(parameter, optim).moments)


def statistic_shape(key: str, shape: Shape) -> Shape | None:
    """Of what is kept under a key, whole on every rank, of a parameter of that shape; None where it is a moment."""
    shapes = {kept: shape_of for update in OPTIMIZERS.values() for kept, shape_of in update.statistics.items()}
    return shapes[key](shape) if key in shapes else None
