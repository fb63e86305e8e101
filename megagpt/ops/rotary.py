"""Rotary position embedding of queries and keys where they lie, packed with the values, in one pass.

Source: Su et al. 2021 (RoFormer), section 3.4.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megagpt.ops.library import call, define, differentiable, require_same_device, runs_kernel


def rotary(
    qkv_BTGXK: Tensor,
    cos_SR: Tensor,
    sin_SR: Tensor,
    *,
    positions_BT: Tensor | None = None,
    n_rotated_heads: int | None = None,
    interleaved: bool = False,
    kernels: str = "auto",
) -> Tensor:
    """Turns pairs of elements (a, b) by their position's angles: (a cos - b sin, b cos + a sin); copies all the rest.

    Of the X heads of a group the first n_rotated_heads are turned, by default all but the last: [queries, key, value].
    Of a head's K elements the first 2R are. Their pairs are (i, R + i) as in GPT-NeoX and LLaMA or, interleaved,
    (2i, 2i + 1) as in GPT-J. Token t has row t of the tables, or positions_BT[b, t]: for packed documents, decoding.
    The tables are constants: no gradient reaches them.
    Shapes: qkv (B, T, G, X, K), cos and sin (S, R) float32 (float64 for a float64 qkv), positions (B, T) int64
    → (B, T, G, X, K) of qkv's dtype.
    Raises ValueError for shapes, dtypes and devices that do not fit together.
    """
    if qkv_BTGXK.dim() != 5:
        raise ValueError(f"rotary: got qkv {_text(qkv_BTGXK)}, wanted (B, T, G, X, K)")
    n = qkv_BTGXK.shape[3] - 1 if n_rotated_heads is None else n_rotated_heads
    _check(qkv_BTGXK, cos_SR, sin_SR, positions_BT, n)
    if runs_kernel("rotary", qkv_BTGXK, kernels):
        return call("rotary", qkv_BTGXK, cos_SR, sin_SR, positions_BT, n, interleaved, False)
    rows = slice(qkv_BTGXK.shape[1]) if positions_BT is None else positions_BT
    cos, sin = (table.detach()[rows].unsqueeze(-2).unsqueeze(-2) for table in (cos_SR, sin_SR))
    heads, other_heads = qkv_BTGXK.split((n, qkv_BTGXK.shape[3] - n), dim=-2)
    n_turned = 2 * cos.shape[-1]
    x, rest = heads.split((n_turned, heads.shape[-1] - n_turned), dim=-1)
    a, b = (x[..., ::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    turned = (a * cos - b * sin, b * cos + a * sin)
    y = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return torch.cat((torch.cat((y.to(x.dtype), rest), dim=-1), other_heads), dim=-2)


def rotary_frequencies(d_rotary: int, base: float = 10000.0) -> Tensor:
    """base^(-2i / d_rotary): radians a token.

    Shapes: → (d_rotary / 2) float64.
    Raises ValueError for an odd d_rotary.
    """
    if d_rotary % 2:
        raise ValueError(f"rotary_frequencies: got d_rotary={d_rotary}, wanted an even one")
    return base ** -(torch.arange(0, d_rotary, 2, dtype=torch.float64) / max(d_rotary, 1))


def rotary_tables(
    seq_len: int,
    frequency_R: Tensor,
    magnitude: float = 1.0,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """cos and sin of position · frequency, computed in float64, times magnitude.

    Shapes: frequency_R float64 → two of (seq_len, R), of dtype.
    """
    angle_SR = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequency_R)
    return (angle_SR.cos() * magnitude).to(device, dtype), (angle_SR.sin() * magnitude).to(device, dtype)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, n_rotated_heads: int) -> None:
    require_same_device("rotary", qkv, cos=cos, sin=sin, positions=positions)
    if not 0 <= n_rotated_heads <= qkv.shape[3]:
        raise ValueError(
            f"rotary: got qkv {_text(qkv)} of {n_rotated_heads} rotated heads, wanted (B, T, G, X, K), <= X"
        )
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > qkv.shape[4]:
        raise ValueError(f"rotary: got cos {_text(cos)}, sin {_text(sin)}, wanted (S, R) with 2R <= {qkv.shape[4]}")
    wanted = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    if cos.dtype != wanted or sin.dtype != wanted:
        raise ValueError(f"rotary: got cos {_text(cos)}, sin {_text(sin)}, wanted {wanted} for qkv {_text(qkv)}")
    if positions is None and cos.shape[0] < qkv.shape[1]:
        raise ValueError(
            f"rotary: got tables of {cos.shape[0]} rows, wanted at least {qkv.shape[1]}, the tokens of qkv"
        )
    if positions is not None and (positions.shape != qkv.shape[:2] or positions.dtype != torch.int64):
        raise ValueError(f"rotary: got positions {_text(positions)}, wanted {tuple(qkv.shape[:2])} of torch.int64")


def _text(x: Tensor) -> str:
    return f"{tuple(x.shape)} {x.dtype}"


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    _, cos, sin, positions, *ctx.how = inputs
    ctx.save_for_backward(cos, sin, positions)


def _backward(ctx, grad: Tensor) -> tuple:
    """A rotation's gradient is turned back."""
    n_rotated_heads, interleaved, inverse = ctx.how
    dqkv = torch.ops.megagpt.rotary(grad, *ctx.saved_tensors, n_rotated_heads, interleaved, not inverse)
    return dqkv, None, None, None, None, None, None


define(
    "rotary(Tensor qkv, Tensor cos, Tensor sin, Tensor? positions, int n_rotated_heads, bool interleaved, bool inverse)"
    " -> Tensor",
    lambda qkv, cos, sin, positions, n_rotated_heads, interleaved, inverse: qkv.new_empty(qkv.shape),
)
differentiable("rotary", _save, _backward)
