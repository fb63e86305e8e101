"""Soft cap: squeezes logits smoothly into (-cap, cap), so that none grows without bound.

The worked example of docs/adding-a-kernel.md: the four files of an op as its reader would leave them.
Source: Gemma 2 (Gemma Team 2024), section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt.ops.library import call, define, differentiable, runs_kernel


def softcap(x: Tensor, cap: float, *, kernels: str = "auto") -> Tensor:
    """cap · tanh(x / cap), elementwise.

    Shapes: x (*) → (*), of x's dtype.
    Raises ValueError unless cap > 0.
    """
    if not cap > 0:
        raise ValueError(f"softcap: got cap={cap}, wanted cap > 0")
    if runs_kernel("softcap", x, kernels):
        return call("softcap", x, cap)
    return cap * torch.tanh(x / cap)  # formula


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, ctx.cap = inputs
    ctx.save_for_backward(x)


def _backward(ctx, grad: Tensor) -> tuple:
    (x,) = ctx.saved_tensors
    return torch.ops.megagpt.softcap_backward(grad, x, ctx.cap), None


define("softcap(Tensor x, float cap) -> Tensor", lambda x, cap: x.new_empty(x.shape))
define("softcap_backward(Tensor grad, Tensor x, float cap) -> Tensor", lambda grad, x, cap: x.new_empty(x.shape))
differentiable("softcap", _save, _backward)
