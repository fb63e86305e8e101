"""One channel for every number that is not finite: the gradient norm, which all ranks agree on anyway.

A NaN or Inf in a weight, an activation or a gradient ends up in some gradient, and with that in the norm of all of
them: DeepSpeed and our own clipping then leave the optimizer alone, on every rank. Two things would not get there, and
are led there: a loss that is infinite while its gradient is not, and gradients that the norm leaves out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from megagpt.parallel.mesh import Mesh
from megagpt.train.step.named import Named


def nan_to_gradient(loss: Tensor) -> Tensor:
    """The loss itself; where it is not finite, its gradient is NaN. Bit for bit without effect where it is."""
    return loss * (1 + 0 * loss.detach())


def counts(named: Named, mesh: Mesh) -> bool:
    """Whether this rank's gradient of a parameter is the one that the norm counts: each logical element once."""
    return named.owned and (named.part.dim is not None or mesh.model.rank == 0)


def watch_uncounted(optimizer: Any, parameters: list[Named], mesh: Mesh) -> None:
    """Let DeepSpeed's ZeRO see a NaN in a gradient that its norm leaves out: of an unsharded weight, on model rank > 0.

    All ranks have the same such gradients, unless one of them computes wrongly: that one spoils a gradient that counts.
    Only this rank's memory is read: no wait for the device. Comm: none.
    """
    if getattr(optimizer, "cpu_offload", False):
        # It looks at each gradient on its way to the host, and asks all ranks: none of them may stay out of that.
        optimizer.check_grad_overflow = optimizer.check_grad_overflow or mesh.model.size > 1
        return
    counted = {id(n.parameter) for n in parameters if counts(n, mesh)}
    if len(counted) == len(parameters):
        return
    step = optimizer.step

    def spoil_and_step(*args: Any, **kwargs: Any) -> Any:
        gradients = list(_gradients(optimizer))
        left_out = [grad for parameter, grad in gradients if id(parameter) not in counted]
        counting = [grad for parameter, grad in gradients if id(parameter) in counted]
        if left_out and counting:
            # Of each the largest element, since in fp16 sums overflow where no element does.
            largest = torch.stack(torch._foreach_norm(left_out, math.inf))
            counting[0].detach().view(-1)[:1].masked_fill_(~largest.isfinite().all(), math.nan)
        return step(*args, **kwargs)

    optimizer.step = spoil_and_step


def _gradients(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the reduced gradients, where each of DeepSpeed's optimizers keeps it."""
    if isinstance(optimizer, BF16_Optimizer):
        groups = zip(optimizer.bf16_groups, optimizer.fp32_groups_gradients, strict=True)
    else:
        owned = getattr(optimizer, "params_in_partition", None) or optimizer.fp16_groups  # ZeRO 1 and 2, or 3
        groups = ((parameters, optimizer.averaged_gradients[i]) for i, parameters in enumerate(owned))
    for parameters, gradients in groups:  # ZeRO 1 and 2 may have a gradient more, for their padding
        yield from zip(parameters, gradients or (), strict=False)
