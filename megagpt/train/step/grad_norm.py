"""The global gradient norm and clipping by it; and through it one channel for every number that is not finite.

A NaN or Inf in a weight, an activation or a gradient ends up in some gradient, and with that in the norm of all of
them, on which all ranks agree anyway: where it is not finite, no rank's optimizer moves. An infinite loss whose
gradient is finite would not get there, and is led there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt.parallel.collectives import all_reduce
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.parameter import Named


def nan_to_gradient(loss: Tensor) -> Tensor:
    """The loss itself; where it is not finite, its gradient is NaN. Bit for bit without effect where it is."""
    return loss * (1 + 0 * loss.detach())


def counts(named: Named, mesh: Mesh) -> bool:
    """Whether this rank's gradient of a parameter is the one that the norm counts: each logical element once."""
    return named.owned and (named.part.dim is not None or mesh.model.rank == 0)


def global_grad_norm(parameters: list[Named], mesh: Mesh) -> Tensor:
    """√ of the sum of squares over the whole model, each logical element counted once; not finite if any is not.

    Comm: all-reduce of one number over the model axis and one over the pipe axis.
    """
    held = [(n, n.parameter.grad) for n in parameters if n.parameter.grad is not None]
    norms = torch.stack(torch._foreach_norm([grad for _, grad in held])).square()
    # Left out by a factor of 0, not by an if: a NaN of this rank alone must reach the others.
    total = (norms * torch.tensor([float(counts(n, mesh)) for n, _ in held], device=norms.device)).sum()
    for axis in (mesh.model, mesh.pipe):
        total = all_reduce(total, axis)
    return total.sqrt()


def clip(parameters: list[Named], norm: Tensor, limit: float) -> bool:
    """Scale the gradients so that their global norm, which is `norm` now, is at most `limit` (0: leave them).

    Returns whether the norm is finite. Where it is not, the gradients are dropped: without them no optimizer moves.
    """
    if not bool(torch.isfinite(norm)):
        for named in parameters:
            named.parameter.grad = None
        return False
    if limit > 0:
        scale = torch.clamp(limit / (norm + 1e-6), max=1.0)
        torch._foreach_mul_([n.parameter.grad for n in parameters if n.parameter.grad is not None], scale)
    return True
