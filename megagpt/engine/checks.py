"""The debug switches: is equal what must be equal across ranks, and which module made the first NaN."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megagpt.engine.engine import Engine
from megagpt.engine.masters import read
from megagpt.engine.storage import WEIGHT
from megagpt.errors import UserError
from megagpt.parallel.agree import together
from megagpt.parallel.axis import Axis


def check_ranks(engine: Engine, step: int) -> None:
    """Every weight must be equal on all data-parallel ranks, and an unsharded one on all ranks of the model axis.

    Comm: all-gathers of one number per parameter. Raises a RankError on all ranks that names the first parameter.
    """
    differing: list[str] = []
    for named in engine.parameters:
        print_of_it = _fingerprint(read(engine, named, WEIGHT))
        axes = [engine.mesh.data] + ([engine.mesh.model] if named.part.dim is None else [])
        if any(not _equal_over(print_of_it, axis) for axis in axes):
            differing.append(named.name)

    def report() -> None:
        if differing:
            raise UserError(
                f"step {step}, {engine.mesh.name}: {differing[0]} differs between ranks that must agree "
                f"({len(differing)} parameters do); a layer computes something rank by rank that it should not"
            )

    together(report)


def name_first_nan(module: nn.Module) -> None:
    """From now on, a forward pass stops at the first layer whose output is not finite, and names it."""
    for name, child in module.named_modules():
        if not list(child.children()):
            child.register_forward_hook(_finite_or_raise(name or type(child).__name__))


def _finite_or_raise(name: str):
    def hook(_module: nn.Module, _inputs: object, output: object) -> None:
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if isinstance(t, Tensor)]
        for tensor in tensors:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise UserError(f"rank {dist.get_rank()}: module {name} is the first with a NaN or Inf in its output")

    return hook


def _fingerprint(value: Tensor) -> Tensor:
    """A number that changes with any bit of the tensor, almost surely: a weighted sum of its bit patterns."""
    bits = value.contiguous().view(torch.int32).flatten().to(torch.int64)
    weights = torch.arange(1, bits.numel() + 1, device=bits.device) * 2654435761
    return (bits * weights).sum()


def _equal_over(value: Tensor, axis: Axis) -> bool:
    if axis.size == 1:
        return True
    all_values = [torch.empty_like(value) for _ in range(axis.size)]
    dist.all_gather(all_values, value, group=axis.group)
    return all(bool(v == value) for v in all_values)
