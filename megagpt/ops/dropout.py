"""Dropout that does not depend on the layout: the mask follows from what an element is, not from who computes it.

Element e of sample s at a dropout site of the model is kept iff word e % 4 of
Philox4x32-10(counter = (e // 4, s), key = (seed, site)) is at least p * 2^32. Sample positions are unique over a
run, so no step is needed; the mask is recomputed in the backward pass, never stored, and the same on every device.

Source: Srivastava et al. 2014 (dropout); Salmon et al. 2011 (Philox).
Shapes: B samples, * any, F elements of one sample, N blocks of four.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megagpt.ops.library import call, define, differentiable, require_same_device, runs_kernel
from megagpt.philox import philox_reference


def dropout(
    x: Tensor,
    sample_ids_B: Tensor,
    *,
    p: float,
    seed: int,
    site: int,
    offset: int = 0,
    within: tuple[int, int] | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Zero elements of x with probability p and scale the rest by 1 / (1 - p).

    Shapes: x (B, *), sample_ids_B (B,) int64 → (B, *).
    x[b] flattened is the part of sample b's logical tensor that begins at element `offset`: a shard of heads or of
    the sequence passes its own offset and draws exactly its part of the whole mask. within: the whole is of matrices of
    so many rows and columns, and each matrix (the last two dims) of x a part of one of them, whose first element is
    element `offset` of the first.
    Raises ValueError unless 0 <= p < 1, there is one id per sample, on x's device, and x's matrices fit into `within`.
    """
    require_mask("dropout", x, sample_ids_B, p)
    rows, columns = within or (0, 0)
    if within and (x.dim() < 3 or x.shape[-2] > rows or x.shape[-1] > columns):
        raise ValueError(f"dropout: got x {tuple(x.shape)}, wanted (B, *, up to {rows}, up to {columns})")
    if p == 0.0:
        return x
    if runs_kernel("dropout", x, kernels):
        return call("dropout", x, sample_ids_B, p, seed, site, offset, rows, columns)
    return _reference(x, sample_ids_B, p, seed, site, offset, rows, columns)


def require_mask(op: str, x: Tensor, sample_ids_B: Tensor, p: float) -> None:
    """Raise ValueError unless 0 <= p < 1 and there is one id per sample, on x's device."""
    require_same_device(op, x, sample_ids=sample_ids_B)
    if not 0.0 <= p < 1.0:
        raise ValueError(f"{op}: got p={p}, wanted 0 <= p < 1")
    if x.dim() == 0 or sample_ids_B.shape != x.shape[:1]:
        raise ValueError(f"{op}: got x {tuple(x.shape)} and ids {tuple(sample_ids_B.shape)}, wanted an id per sample")


def dropout_reference(x: Tensor, sample_ids: Tensor, p: float, seed: int, site: int, offset: int) -> Tensor:
    """What the kernels of `dropout` compute, in plain torch."""
    elements = x[0].numel() if x.shape[0] else 0
    first = offset // 4
    blocks_N = torch.arange(first, (offset + elements + 3) // 4, device=x.device)
    words = philox_reference(blocks_N[None], sample_ids[:, None], (seed, site))
    words_BF = torch.stack(torch.broadcast_tensors(*words), dim=-1).flatten(1)[:, offset - 4 * first :][:, :elements]
    return _applied(x, words_BF, p)


def _reference(
    x: Tensor, sample_ids: Tensor, p: float, seed: int, site: int, offset: int, rows: int, columns: int
) -> Tensor:
    """Likewise; of parts of matrices element by element."""
    if not columns or not x.numel():
        return dropout_reference(x, sample_ids, p, seed, site, offset)
    n_rows, n_columns = x.shape[-2:]
    sides = (math.prod(x.shape[1:-2]), rows * columns), (n_rows, columns), (n_columns, 1)
    first, row, column = (torch.arange(n, device=x.device) * apart for n, apart in sides)
    elements_F = (offset + first[:, None, None] + row[:, None] + column).flatten()
    words = philox_reference((elements_F // 4)[None], sample_ids[:, None], (seed, site))
    words_BF4 = torch.stack(torch.broadcast_tensors(*words), dim=-1)
    return _applied(x, words_BF4.gather(-1, (elements_F % 4).expand(len(x), -1)[..., None]).squeeze(-1), p)


def _applied(x: Tensor, words_BF: Tensor, p: float) -> Tensor:
    keep = (words_BF >= int(p * 2**32)).view(x.shape)
    scale = torch.tensor(1.0 / (1.0 - p), dtype=torch.float32)  # as the kernels round it
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.where(keep, wide * scale.to(wide), 0.0).to(x.dtype)


def _fake(
    x: Tensor, sample_ids: Tensor, p: float, seed: int, site: int, offset: int, rows: int, columns: int
) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    _, sample_ids, *ctx.key = inputs
    ctx.save_for_backward(sample_ids)


def _backward(ctx, grad: Tensor) -> tuple:
    (sample_ids,) = ctx.saved_tensors
    return torch.ops.megagpt.dropout(grad, sample_ids, *ctx.key), *[None] * 7


# rows and columns: 0, or of the matrices that x's are parts of.
define(
    "dropout(Tensor x, Tensor sample_ids, float p, int seed, int site, int offset, int rows, int columns) -> Tensor",
    _fake,
)
differentiable("dropout", _save, _backward)
