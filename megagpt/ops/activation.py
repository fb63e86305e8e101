"""Bias and activation in one pass over the MLP's widest tensor: GELU, ReLU², SwiGLU and their kin.

Sources: Hendrycks & Gimpel 2016 (GELU, SiLU); Shazeer 2020 (GLU variants); So et al. 2021, section 4 (squared ReLU).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.ops.library import call, define, differentiable, require_same_device, runs_kernel

Kind = Literal["gelu", "gelu_tanh", "relu", "relu2", "silu"]
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "silu": F.silu,
}


def activation(
    x: Tensor, bias: Tensor | None = None, *, kind: Kind, gated: bool = False, kernels: str = "auto"
) -> Tensor:
    """f(x + bias); gated, x and bias are packed [gate | up]: f(gate + bias) · (up + bias), e.g. SwiGLU for "silu".

    x + bias is not rounded; backward computes it anew from x and bias, so that nothing else is kept.
    Shapes: x (*, F), bias (F) → (*, F); gated: x (*, 2F), bias (2F) → (*, F).
    Raises ValueError for an unknown kind, an odd width of a gate, a bias of another shape, dtype or device.
    """
    if kind not in FUNCTIONS:
        raise ValueError(f"activation: got kind={kind!r}, wanted one of {', '.join(FUNCTIONS)}")
    if x.dim() == 0 or (gated and x.shape[-1] % 2):
        raise ValueError(f"activation: got x {tuple(x.shape)}, wanted (*, {'2F' if gated else 'F'})")
    if bias is not None and (bias.shape != x.shape[-1:] or bias.dtype != x.dtype):
        raise ValueError(
            f"activation: got bias {_text(bias)}, wanted ({x.shape[-1]},) of {x.dtype} as for x {_text(x)}"
        )
    require_same_device("activation", x, bias=bias)
    if runs_kernel("activation", x, kernels):
        return call("activation", x, bias, kind, gated)
    z = x if bias is None else x + bias
    if not gated:
        return FUNCTIONS[kind](z)
    gate, up = z.chunk(2, dim=-1)
    return FUNCTIONS[kind](gate) * up


def _text(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    x, bias, ctx.kind, ctx.gated = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad: Tensor) -> tuple:
    x, bias = ctx.saved_tensors
    dx, dbias = torch.ops.megagpt.activation_backward(grad, x, bias, ctx.kind, ctx.gated)
    return dx, None if bias is None else dbias, None, None


def _fake(x: Tensor, bias: Tensor | None, kind: str, gated: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1])


def _fake_backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str, gated: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if bias is None else x.shape[-1])


define("activation(Tensor x, Tensor? bias, str kind, bool gated) -> Tensor", _fake)
define(
    "activation_backward(Tensor grad, Tensor x, Tensor? bias, str kind, bool gated) -> (Tensor, Tensor)",
    _fake_backward,
)
differentiable("activation", _save, _backward)
