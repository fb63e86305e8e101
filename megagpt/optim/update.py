"""How parameters are stepped, and what is kept of them: what a kind of optimizer says and does.

A kind is one file beside this one and a line of OPTIMIZERS. Torch is imported where it computes, so that a plan reads
what an optimizer keeps without it.

Most kinds step in our `MeshOptimizer`. It hands them the masters, the fp32 tensors that DeepSpeed steps on (shards of
several parameters laid end to end), and says where in these each parameter lies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megagpt.config import OptimConfig, RunConfig
    from megagpt.inventory.parameter import Parameter, Shape
    from megagpt.optim.mesh_optimizer import MeshOptimizer

EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"


class Update(ABC):
    """One way to step parameters.

    name: what groups of parameters are sorted by, alike on every rank.
    moments: keys of the fp32 tensors of a parameter's own shape that it keeps, cut and padded as the parameter is.
    statistics: keys of what it keeps beside these, whole on every rank, and their shapes for the parameter's.
    """

    name: ClassVar[str]
    moments: ClassVar[tuple[str, ...]] = ()
    statistics: ClassVar[Mapping[str, Callable[[Shape], Shape]]] = {}

    def of(self, parameter: Parameter) -> Update:
        """What steps this parameter where this optimizer is chosen."""
        return self

    def check(self, optim: OptimConfig) -> None:  # noqa: B027  # most have nothing to check
        """Raises UserError for settings that do not fit together."""

    def settings(self, run: RunConfig) -> dict[str, Any]:
        """What a step reads of the run, beside learning rate, betas, eps and weight decay."""
        return {}

    def build(
        self, groups: list[dict[str, Any]], settings: dict[str, Any], on_gpu: bool
    ) -> tuple[torch.optim.Optimizer, str] | None:
        """An optimizer of torch's kind over groups of parameters, where this one is chosen and there is one; its name.

        settings: what a step reads, see `step`.  on_gpu: whether it steps there.  None: `MeshOptimizer` calls `step`.
        """
        return None

    @abstractmethod
    def step(self, optimizer: MeshOptimizer, masters: list[Tensor], group: dict[str, Any]) -> None:
        """One step of `masters`, each with a gradient, which it may overwrite; optimizer.state has their moments.

        group: their settings, lr, betas, eps, weight_decay and those of `settings`.
        """
