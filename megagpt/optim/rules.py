"""How each parameter is stepped, and what its optimizer keeps of it: a pure function of its name and shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megagpt.checkpoint.pieces import AVERAGE
from megagpt.config import OptimConfig
from megagpt.parallel.parameter import Part
from megagpt.train.step.named import Named

EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
ROWS, COLUMNS = "exp_avg_sq_rows", "exp_avg_sq_columns"


@dataclass(frozen=True)
class Rule:
    """What steps a parameter.

    moments: fp32 tensors of the parameter's own shape that it keeps, cut and padded as the parameter is. factored:
    whether it keeps means over rows and columns in place of the second moment, whole on every rank. decays: whether
    weight decay applies.
    """

    update: Literal["adam", "lion", "adafactor", "muon"]
    moments: tuple[str, ...]
    decays: bool
    factored: bool = False

    @property
    def statistics(self) -> tuple[str, ...]:
        """The keys of what is kept beside the moments."""
        return (ROWS, COLUMNS) if self.factored else ()


def rule_of(named: Named, config: OptimConfig) -> Rule:
    """The rule of one parameter. Matrices decay, biases and gains do not."""
    is_matrix = len(named.part.shape) >= 2 and "bias" not in named.name.rpartition(".")[2]  # gates have biases (2, F)
    average = (AVERAGE,) if config.ema_decay is not None else ()
    adam = Rule("adam", (EXP_AVG, EXP_AVG_SQ, *average), is_matrix)
    match config.optimizer:
        case "adafactor" if is_matrix:
            return Rule("adafactor", average, is_matrix, factored=True)
        case "adafactor":
            return Rule("adafactor", (EXP_AVG_SQ, *average), is_matrix)
        case "adafactor_unfactored":
            return Rule("adafactor", (EXP_AVG, EXP_AVG_SQ, *average), is_matrix)
        case "lion":
            return Rule("lion", (EXP_AVG, *average), is_matrix)
        case "muon" if is_matrix and _is_linear_map(named):
            return Rule("muon", (EXP_AVG, *average), is_matrix)
        case _:
            return adam


def place_of(named: Named, key: str) -> Part:
    """Which part this rank has of what is kept under a key: of a moment as of the parameter; statistics are whole."""
    return _whole(statistic_shape(key, named.part.shape)) if key in (ROWS, COLUMNS) else named.part


def statistic_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the means over rows (a number a row), or over columns; leading dims number matrices."""
    return shape[:-1] if key == ROWS else (*shape[:-2], shape[-1])


def _whole(shape: tuple[int, ...]) -> Part:
    return Part(shape, dim=None, start=0, length=0)


def _is_linear_map(named: Named) -> bool:
    """Whether this is a linear map within a block, or several: what Muon is for.

    A table of numbers (T5's buckets) is none, nor is a step of a butterfly, which only mixes pairs.
    """
    return named.name.startswith("blocks.") and ".buckets." not in named.name and min(named.part.shape[-2:]) > 2
