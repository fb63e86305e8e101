"""LayerNorm and RMSNorm, alone or of a residual sum, which the same pass over memory then adds and returns.

The norm is that of the sum as rounded to its dtype: fused and unfused give the same.
Source: Ba et al. 2016 (LayerNorm), section 3; Zhang & Sennrich 2019 (RMSNorm), section 4.
Shapes: * any, D the columns of a row, which is normalised.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.ops.library import call, define, differentiable, require_same_device, runs_kernel


def layer_norm(x: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float, *, kernels: str = "auto") -> Tensor:
    """(x - mean) / sqrt(variance + eps) · weight + bias, over the last dimension.

    Shapes: x (*, D), weight_D and bias_D (D,) → (*, D), all of x's dtype.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check("layer_norm", x, None, weight_D, bias_D)
    if runs_kernel("norm", x, kernels):
        return call("norm", x, None, weight_D, bias_D, eps, True)[0]
    return F.layer_norm(x, weight_D.shape, weight_D, bias_D, eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float, *, kernels: str = "auto") -> Tensor:
    """x / sqrt(mean of squares + eps) · weight, over the last dimension.

    Shapes: x (*, D), weight_D (D,) → (*, D), all of x's dtype.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check("rms_norm", x, None, weight_D, None)
    if runs_kernel("norm", x, kernels):
        return call("norm", x, None, weight_D, None, eps, False)[0]
    return F.rms_norm(x, weight_D.shape, weight_D, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, bias_D: Tensor | None, eps: float, *, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """layer_norm of x + residual, and x + residual.

    Shapes: x and residual (*, D), weight_D and bias_D (D,) → (*, D), (*, D), all of x's dtype.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check("add_layer_norm", x, residual, weight_D, bias_D)
    if runs_kernel("norm", x, kernels):
        y, total, _, _ = call("norm", x, residual, weight_D, bias_D, eps, True)
        return y, total
    total = x + residual
    return F.layer_norm(total, weight_D.shape, weight_D, bias_D, eps), total


def add_rms_norm(
    x: Tensor, residual: Tensor, weight_D: Tensor, eps: float, *, kernels: str = "auto"
) -> tuple[Tensor, Tensor]:
    """rms_norm of x + residual, and x + residual.

    Shapes: x and residual (*, D), weight_D (D,) → (*, D), (*, D), all of x's dtype.
    Raises ValueError where shapes, dtypes or devices do not fit.
    """
    _check("add_rms_norm", x, residual, weight_D, None)
    if runs_kernel("norm", x, kernels):
        y, total, _, _ = call("norm", x, residual, weight_D, None, eps, False)
        return y, total
    total = x + residual
    return F.rms_norm(total, weight_D.shape, weight_D, eps), total


def _check(what: str, x: Tensor, residual: Tensor | None, weight_D: Tensor, bias_D: Tensor | None) -> None:
    require_same_device(what, x, residual=residual, weight=weight_D, bias=bias_D)
    wanted = {"residual": (residual, x.shape), "weight": (weight_D, x.shape[-1:]), "bias": (bias_D, x.shape[-1:])}
    if x.dim() == 0:
        raise ValueError(f"{what}: got x of no dimensions, wanted (*, D)")
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x.dtype):
            raise ValueError(
                f"{what}: got {name} {tuple(tensor.shape)} of {tensor.dtype}, wanted {tuple(shape)} of {x.dtype}"
            )


def _fake(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, center: bool) -> tuple:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rstd = x.new_empty(x.shape[:-1], dtype=wide)
    mean = x.new_empty(rstd.shape if center else (0,), dtype=wide)
    return x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape), mean, rstd


def _fake_backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, center: bool
) -> tuple:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape if center else 0)


def _save(ctx, inputs: tuple, output: tuple) -> None:
    x, residual, weight, bias, _, ctx.center = inputs
    _, total, mean, rstd = output
    ctx.added, ctx.biased = residual is not None, bias is not None
    ctx.save_for_backward(total if ctx.added else x, mean, rstd, weight)
    ctx.mark_non_differentiable(mean, rstd, *(() if ctx.added else (total,)))
    ctx.set_materialize_grads(False)


def _backward(ctx, grad: Tensor | None, grad_sum: Tensor | None, *_: None) -> tuple:
    if grad is None:  # only the sum was used
        return grad_sum, grad_sum if ctx.added else None, None, None, None, None
    normed, mean, rstd, weight = ctx.saved_tensors
    backward = torch.ops.megagpt.norm_backward
    dx, dweight, dbias = backward(grad, grad_sum, normed, mean, rstd, weight, ctx.center)
    return dx, dx if ctx.added else None, dweight, dbias if ctx.biased else None, None, None


# sum is empty without a residual, mean without center (RMSNorm); a bias is for center only.
define(
    "norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool center)"
    " -> (Tensor y, Tensor sum, Tensor mean, Tensor rstd)",
    _fake,
)
define(
    "norm_backward(Tensor grad, Tensor? grad_sum, Tensor x, Tensor mean, Tensor rstd, Tensor weight, bool center)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    _fake_backward,
)
differentiable("norm", _save, _backward)
