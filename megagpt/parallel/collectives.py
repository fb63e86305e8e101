"""Collectives with gradients: the conjugate pairs f and g of Shoeybi et al. 2019, section 3.

Each is the identity on an axis of size 1, and returns a new tensor otherwise.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.parallel.axis import Axis


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """f: the replicated input of a column-parallel layer. Comm: forward none; backward all-reduce over the axis."""
    return x if axis.size == 1 else _Copy.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """g: sum of the partial outputs of a row-parallel layer. Comm: forward all-reduce over the axis; backward none."""
    return x if axis.size == 1 else _Reduce.apply(x, axis)


def gather_from(x: Tensor, axis: Axis) -> Tensor:
    """Concatenate the last dim over the axis. Comm: forward all-gather; backward none (each rank keeps its slice)."""
    return x if axis.size == 1 else _Gather.apply(x, axis)


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """All-reduce without gradient, into a new tensor; the identity on an axis of size 1."""
    if axis.size == 1:
        return x
    y = x.clone()
    dist.all_reduce(y, op=op, group=axis.group)
    return y


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return all_reduce(grads[0].contiguous(), ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        return all_reduce(x.contiguous(), axis)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0], None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis, ctx.width = axis, x.shape[-1]
        parts = [torch.empty_like(x) for _ in range(axis.size)]
        dist.all_gather(parts, x.contiguous(), group=axis.group)
        return torch.cat(parts, dim=-1)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0].narrow(-1, ctx.axis.rank * ctx.width, ctx.width).contiguous(), None
