"""A debug switch: is equal what must be equal across ranks?"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.errors import UserError
from megagpt.inventory.layers import TIED
from megagpt.parallel.axis import Axis
from megagpt.processes.agree import together

if TYPE_CHECKING:
    from megagpt.train.step.engine import Engine


def check_ranks(engine: Engine, step: int) -> None:
    """What the model computes with must be equal on all ranks that hold the same of it.

    A weight: over the data axis (ZeRO 3 leaves no copies there), over the model axis if it is not sharded, and on both
    ends of the pipeline if it is tied.
    Comm: all-gathers of one number per parameter.  Raises a RankError on all ranks that names the first parameter.
    """
    mesh, differing = engine.mesh, []
    for named in engine.parameters:
        print_of_it = _fingerprint(engine.backend.local_weights(named)[-1])
        axes = [mesh.data] if engine.backend.data_replicas else []
        axes += [mesh.model] if named.part.dim is None else []
        equal = [_equal_over(print_of_it, axis) for axis in axes]  # all of them: every rank must gather every time
        if not all(equal):
            differing.append(named.name)
    if mesh.pipe.size > 1 and engine.config.model.tied_embeddings and not _tied_ends_equal(engine):
        differing.append(TIED)

    def report() -> None:
        if differing:
            raise UserError(
                f"step {step + 1}, {mesh.name}: {differing[0]} differs between ranks that must agree "
                f"({len(differing)} parameters do); a layer computes something rank by rank that it should not"
            )

    together(report)


def _fingerprint(value: Tensor) -> Tensor:
    """A number that changes with any bit of the tensor, almost surely: a weighted sum of its bit patterns."""
    bits = value.float().contiguous().view(torch.int32).flatten().to(torch.int64)
    weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 2654435761
    return (bits * weights).sum()


def _equal_over(value: Tensor, axis: Axis) -> bool:
    return len({int(v) for v in _gather(value, axis)}) == 1


def _tied_ends_equal(engine: Engine) -> bool:
    """Whether first and last stage hold the same; the stages between take part in the gathering."""
    here = [n.parameter.detach() for n in engine.parameters if n.name == TIED]
    value = _fingerprint(here[0]) if here else torch.zeros((), dtype=torch.int64, device=engine.device)
    values = _gather(value, engine.mesh.pipe)
    return int(values[0]) == int(values[-1])


def _gather(value: Tensor, axis: Axis) -> list[Tensor]:
    if axis.size == 1:
        return [value]
    values = [torch.empty_like(value) for _ in range(axis.size)]
    dist.all_gather(values, value, group=axis.group)
    return values
