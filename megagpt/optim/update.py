"""How parameters are stepped, and what is kept of them: what a kind of optimizer says and does.

A kind is one file beside this one and a line of OPTIMIZERS. Torch is imported where it computes, so that a plan reads
what an optimizer keeps without it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.config import OptimConfig, RunConfig
    from megagpt.inventory.parameter import Parameter
    from megagpt.optim.mesh_optimizer import MeshOptimizer

EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
ROWS, COLUMNS = "exp_avg_sq_rows", "exp_avg_sq_columns"


class Update:
    """One way to step parameters.

    name: for the log.  moments: fp32 tensors of a parameter's own shape that it keeps, cut and padded as the parameter
    is.  statistics: what it keeps beside these, whole on every rank.  by_torch: whether torch's own optimizer steps.
    """

    name: ClassVar[str]
    moments: ClassVar[tuple[str, ...]] = ()
    statistics: ClassVar[tuple[str, ...]] = ()
    by_torch: ClassVar[bool] = False

    def of(self, parameter: Parameter) -> Update:
        """What steps this parameter where this optimizer is chosen."""
        return self

    def check(self, optim: OptimConfig) -> None:
        """Raises UserError for settings that do not fit together."""

    def settings(self, run: RunConfig) -> dict[str, Any]:
        """What a step reads of the run, beside learning rate, betas, eps and weight decay."""
        return {}

    def step(self, optimizer: MeshOptimizer, masters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of `masters`, each with a gradient, which it may overwrite; optimizer.state has their moments.

        group: their settings, lr, betas, eps, weight_decay and those of `settings`.
        """
        raise NotImplementedError


def statistic_shape(key: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Of the means over rows (a number a row), or over columns; leading dims number matrices. None for a moment."""
    if key not in (ROWS, COLUMNS):
        return None
    return shape[:-1] if key == ROWS else (*shape[:-2], shape[-1])
