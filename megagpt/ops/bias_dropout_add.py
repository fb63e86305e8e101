"""How a sub-layer ends: its bias, dropout and the residual stream in one pass over memory.

Source: Korthikanti et al. 2022 and Megatron-LM fuse the same three; the mask is that of ops/dropout.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt.ops.dropout import dropout_reference, require_mask
from megagpt.ops.library import call, define, differentiable, require_same_device, runs_kernel


def bias_dropout_add(
    x_BTD: Tensor,
    bias_D: Tensor | None,
    residual_BTD: Tensor,
    sample_ids_B: Tensor,
    *,
    p: float,
    seed: int,
    site: int,
    offset: int = 0,
    kernels: str = "auto",
) -> Tensor:
    """residual + dropout(x + bias), rounded once; p = 0 draws no mask.

    Shapes: x (B, *, D), bias (D,) or None, residual like x, sample_ids_B (B,) int64 → (B, *, D). One dtype.
    x[b] flattened is the part of sample b's logical tensor that begins at element `offset`.
    Raises ValueError unless 0 <= p < 1, the shapes and dtypes are as said, and all lies on one device.
    """
    require_mask("bias_dropout_add", x_BTD, sample_ids_B, p)
    require_same_device("bias_dropout_add", x_BTD, bias=bias_D, residual=residual_BTD)
    if x_BTD.dim() < 2:
        raise ValueError(f"bias_dropout_add: got x {tuple(x_BTD.shape)}, wanted (B, *, D)")
    for name, tensor, shape in (("bias", bias_D, x_BTD.shape[-1:]), ("residual", residual_BTD, x_BTD.shape)):
        if tensor is not None and (tensor.shape != shape or tensor.dtype != x_BTD.dtype):
            got = f"{name} {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"bias_dropout_add: got {got}, wanted {tuple(shape)} of {x_BTD.dtype}")
    if runs_kernel("bias_dropout_add", x_BTD, kernels):
        return call("bias_dropout_add", x_BTD, bias_D, residual_BTD, sample_ids_B, p, seed, site, offset)
    wide = torch.promote_types(x_BTD.dtype, torch.float32)
    x = x_BTD.to(wide) if bias_D is None else x_BTD.to(wide) + bias_D.to(wide)
    if p > 0.0:
        x = dropout_reference(x, sample_ids_B, p, seed, site, offset)
    return (residual_BTD.to(wide) + x).to(x_BTD.dtype)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    _, bias, _, sample_ids, *ctx.key = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(sample_ids)


def _backward(ctx, grad: Tensor) -> tuple:
    (sample_ids,) = ctx.saved_tensors
    p = ctx.key[0]
    dbias = None
    if p == 0.0:
        dx = grad
        if ctx.has_bias:
            dbias = grad.sum(dim=tuple(range(grad.dim() - 1)))
    elif ctx.has_bias:
        dx, dbias = torch.ops.megagpt.bias_dropout_add_backward(grad, sample_ids, *ctx.key)
    else:
        dx = torch.ops.megagpt.dropout(grad, sample_ids, *ctx.key, 0, 0)
    return dx, dbias, grad, None, None, None, None, None


define(
    "bias_dropout_add(Tensor x, Tensor? bias, Tensor residual, Tensor sample_ids, float p, int seed, int site, "
    "int offset) -> Tensor",
    lambda x, bias, residual, sample_ids, p, seed, site, offset: x.new_empty(x.shape),
)
define(
    "bias_dropout_add_backward(Tensor grad, Tensor sample_ids, float p, int seed, int site, int offset) "
    "-> (Tensor, Tensor)",
    lambda grad, *mask: (grad.new_empty(grad.shape), grad.new_empty(grad.shape[-1:])),
)
differentiable("bias_dropout_add", _save, _backward)
