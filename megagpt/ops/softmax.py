"""Softmax of attention scores: scale, band, mask and ALiBi bias in one pass, rounded once.

Kernels read only the columns that a band leaves open, and write zeros to the others: a causal softmax reads half of
the scores. Forward keeps the probabilities for backward, and nothing else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megagpt.ops.library import call, define, differentiable, require_same_device, runs_kernel

# Keys behind or ahead of a query: more than any row has.
UNBOUNDED = 1 << 40


def attention_softmax(
    scores_BHTS: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    slopes_H: Tensor | None = None,
    kernels: str = "auto",
) -> Tensor:
    """Softmax over the keys that each query may attend of scale · scores + slope · (key position - query position).

    Query t stands at key position t + S - T, so that the last one sees all keys (with cached keys too). `causal`
    leaves the keys up to its own position; `window` those nearer than that many positions, its own counted: behind,
    and without `causal` ahead too; `mask` those that it holds True for. A score of -inf is masked; keys that may not
    be attended get 0 and a gradient of 0 whatever their scores are, and so does all of a row without a key. NaN or
    +inf in a score makes its row NaN. The slopes (ALiBi, see `alibi_slopes`) are constants, which get no gradient.

    Shapes: scores (B, H, T, S), mask bool (B or 1, H or 1, T or 1, S or 1), slopes float32 (H) → (B, H, T, S), of
    scores' dtype.
    Source: Attention Is All You Need (Vaswani et al. 2017), section 3.2.1; ALiBi (Press et al. 2022), section 3.
    Raises ValueError for shapes, dtypes, devices or a window that do not fit.
    """
    _check(scores_BHTS, window, mask, slopes_H)
    behind = UNBOUNDED if window is None else min(window - 1, UNBOUNDED)
    ahead = 0 if causal else behind
    if runs_kernel("softmax", scores_BHTS, kernels):
        slopes_H = None if slopes_H is None else slopes_H.float()
        return call("softmax", scores_BHTS, scale, behind, ahead, mask, slopes_H)
    return _reference(scores_BHTS, scale, behind, ahead, mask, slopes_H)


def alibi_slopes(n_heads: int) -> Tensor:
    """ALiBi's slope of each head: 2^(-8/n), 2^(-16/n), … for n a power of two.

    For other numbers, those of the power of two below, then every second one of the power above.

    Shapes: → (n_heads), float32.
    Source: ALiBi (Press et al. 2022), section 3 and its code, get_slopes.
    Raises ValueError unless n_heads >= 1.
    """
    if n_heads < 1:
        raise ValueError(f"alibi_slopes: got n_heads={n_heads}, wanted n_heads >= 1")
    below = 1 << (n_heads.bit_length() - 1)
    exponents = [8 * (i + 1) / below for i in range(below)]
    exponents += [8 * (2 * i + 1) / (2 * below) for i in range(n_heads - below)]
    return torch.tensor([math.pow(2, -e) for e in exponents], dtype=torch.float32)


def _check(scores_BHTS: Tensor, window: int | None, mask: Tensor | None, slopes_H: Tensor | None) -> None:
    require_same_device("attention_softmax", scores_BHTS, mask=mask, slopes=slopes_H)
    shape = tuple(scores_BHTS.shape)
    if len(shape) != 4:
        raise ValueError(f"attention_softmax: got scores of shape {shape}, wanted (B, H, T, S)")
    if window is not None and window < 1:
        raise ValueError(f"attention_softmax: got window={window}, wanted window >= 1 or None")
    if mask is not None:
        fits = mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, shape, strict=True))
        if not fits or mask.dtype != torch.bool:
            wanted = f"bool, each size 1 or that of {shape}"
            raise ValueError(f"attention_softmax: got a mask {mask.dtype} {tuple(mask.shape)}, wanted {wanted}")
    if slopes_H is not None and tuple(slopes_H.shape) != shape[1:2]:
        raise ValueError(f"attention_softmax: got slopes of shape {tuple(slopes_H.shape)}, wanted ({shape[1]},)")


def _reference(
    scores_BHTS: Tensor, scale: float, behind: int, ahead: int, mask: Tensor | None, slopes_H: Tensor | None
) -> Tensor:
    n_queries, n_keys = scores_BHTS.shape[-2:]
    keys_S = torch.arange(n_keys, device=scores_BHTS.device)
    distance_TS = keys_S - torch.arange(n_keys - n_queries, n_keys, device=scores_BHTS.device).unsqueeze(1)
    allowed = (distance_TS >= -behind) & (distance_TS <= ahead)
    if mask is not None:
        allowed = allowed & mask
    x_BHTS = scores_BHTS * scale
    if slopes_H is not None:
        x_BHTS = x_BHTS + slopes_H.view(-1, 1, 1) * distance_TS  # in the slopes' float32, if that is the wider one
    masked = ~allowed | (x_BHTS == -math.inf)
    p_BHTS = torch.softmax(x_BHTS.masked_fill(masked, -math.inf), dim=-1)
    return p_BHTS.masked_fill(masked, 0.0).to(scores_BHTS.dtype)


def _save(ctx, inputs: tuple, output: Tensor) -> None:
    _, ctx.scale, ctx.behind, ctx.ahead, _, _ = inputs
    ctx.save_for_backward(output)


def _backward(ctx, grad: Tensor) -> tuple:
    (p,) = ctx.saved_tensors
    return torch.ops.megagpt.softmax_backward(grad, p, ctx.scale, ctx.behind, ctx.ahead), None, None, None, None, None


define(
    "softmax(Tensor scores, float scale, int behind, int ahead, Tensor? mask, Tensor? slopes) -> Tensor",
    lambda scores, scale, behind, ahead, mask, slopes: scores.new_empty(scores.shape),
)
define(
    "softmax_backward(Tensor grad, Tensor p, float scale, int behind, int ahead) -> Tensor",
    lambda grad, p, scale, behind, ahead: p.new_empty(p.shape),
)
differentiable("softmax", _save, _backward)
