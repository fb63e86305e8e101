"""Butterfly matrices (Dao et al. 2019): log2(n) levels of 2x2 matrices, over the model axis.

A butterfly acts on n = 2^m numbers, whose index consists of m bits. Level s mixes the pairs that differ in bit s, from
the highest to the lowest, each pair by a 2x2 matrix of its own. Here it is never applied level by level: that is m
passes over the activations. The levels that mix the upper half of the bits multiply to one block-diagonal matrix, the
others to a second one, small products of parameters that are taken once a micro-batch; and the tokens go through these
two as through a Monarch grid of rank 1 (a butterfly is one: Dao et al. 2022, section 3.1).

**Widths.** n is the first power of two that the residual stream fits in (the rest is zero, or not looked at); as many
butterflies as the hidden width needs stand side by side, each reading the whole residual stream, and the hidden width
takes its units from all of them evenly. `down` is the transpose of such a stack, with parameters of its own.

**Over the model axis** a rank has a range of the high bits on the hidden side, thus rows (up) or columns (down) of the
grid. Each level's matrices are so few that every rank holds all, and gradients are summed: 4 c n m bytes in fp32 a
micro-batch, beside 4 n bytes a token for the activations.

Shapes: N tokens, g packs (the 2 matrices of a gated unit), c butterflies side by side, m levels, n size, h (high) and
l (low) what the two halves of the bits count to: n = h l. K, J, H, W as in factorised_monarch.py.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.inventory.factorised_sizes import Butterfly
from megagpt.model.factorised_base import FactorisedColumn, FactorisedRow, dense_std
from megagpt.model.factorised_monarch import grid_product
from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import copy_to
from megagpt.parallel.parameter import NamedNormal, replicated


class ButterflyColumn(FactorisedColumn):
    """Outputs shared out: twiddle (packs, m, c, n/2, 2, 2) replicated.

    Comm: forward none; backward all-reduce of the gradients of the input and of twiddle over the axis.
    Source: Dao et al. 2019, section 3; 2022, section 3.1.
    """

    def __init__(self, n_inputs: int, n_outputs: int, axis: Axis, draw: NamedNormal, *, packs: int, bias: bool) -> None:
        super().__init__(n_outputs, axis, draw, packs, bias)
        self.shape, self.n_outputs_local = Butterfly(n_inputs, n_outputs), n_outputs // axis.size
        self.twiddle = replicated(rotations(draw, self.shape, self.packed, dense_std(draw, n_inputs)))

    def product(self, x_I: Tensor) -> Tensor:
        first_KJW, second_JHK = local_grid(self.twiddle, self.shape, self.axis)
        x_I = _padded(copy_to(x_I, self.axis), first_KJW.shape[0] * first_KJW.shape[2])
        y = grid_product(x_I, first_KJW.to(x_I.dtype), second_JHK.to(x_I.dtype))
        slots = y.unflatten(-1, (self.packs, -1))
        kept = _kept_slots(self.n_outputs_local, slots.shape[-1], y.device)
        return y if kept is None else slots.index_select(-1, kept).flatten(-2)


class ButterflyRow(FactorisedRow):
    """Inputs shared out: twiddle (m, c, n/2, 2, 2) replicated, those of the transpose.

    Comm: forward all-reduce of the output over the axis; backward of the gradient of twiddle.
    Source: Dao et al. 2019, section 3; 2022, section 3.1.
    """

    def __init__(self, n_inputs: int, n_outputs: int, axis: Axis, draw: NamedNormal, *, bias: bool) -> None:
        super().__init__(n_outputs, axis, draw, bias)
        self.shape = Butterfly(n_outputs, n_inputs)
        self.twiddle = replicated(rotations(draw, self.shape, (), dense_std(draw, n_inputs)))

    def product(self, x_I_local: Tensor) -> Tensor:
        first_KJW, second_JHK = local_grid(self.twiddle, self.shape, self.axis)
        J, H, _ = second_JHK.shape
        kept = _kept_slots(x_I_local.shape[-1], J * H, x_I_local.device)
        if kept is not None:
            slots = x_I_local.new_zeros(*x_I_local.shape[:-1], J * H)
            x_I_local = slots.index_copy(-1, kept, x_I_local)
        # The transpose of a grid has the transposed factors, in the other order.
        first, second = second_JHK.transpose(1, 2), first_KJW.transpose(1, 2)
        y = grid_product(x_I_local, first.to(x_I_local.dtype), second.to(x_I_local.dtype))
        return self.summed(y[..., : self.shape.n_residual])


def rotations(draw: NamedNormal, shape: Butterfly, packed: tuple[int, ...], std: float) -> Tensor:
    """2x2 matrices that turn pairs by angles of their own, all scaled alike: a butterfly that keeps norms, times
    √n std, so that outputs have the variance that a dense matrix of this standard deviation gives.
    """
    drawn = replace(draw, std=1.0)("twiddle", (*packed, shape.levels, shape.stacks, shape.size // 2, 2))
    cos, sin = (drawn / drawn.norm(dim=-1, keepdim=True)).unbind(-1)
    turned = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)
    return turned * (std * math.sqrt(shape.size)) ** (1 / shape.levels)


def local_grid(twiddle: Tensor, shape: Butterfly, axis: Axis) -> tuple[Tensor, Tensor]:
    """The factors of this rank's rows of the up grid: first (K, J, W), second (J, H, K).

    K is l, as far as the residual stream uses it, W h; J is (packs, this rank's range of h, c), H what is used of l.
    """
    twiddle = copy_to(twiddle.to(torch.promote_types(twiddle.dtype, torch.float32)), axis)
    high_gclhh, low_gchll = merged_levels(twiddle, shape)
    n_mine, used, kept = shape.high // axis.size, shape.kept_residual, shape.kept_hidden
    first = high_gclhh[:, :, :used].narrow(3, n_mine * axis.rank, n_mine).permute(2, 0, 3, 1, 4)
    second = low_gchll[..., :kept, :used].narrow(2, n_mine * axis.rank, n_mine).transpose(1, 2)
    return first.flatten(1, 3), second.flatten(0, 2)


def merged_levels(twiddle: Tensor, shape: Butterfly) -> tuple[Tensor, Tensor]:
    """Both halves of the levels as dense matrices (out, in): (g, c, l, h, h) of the high bits, (g, c, h, l, l)."""
    levels = twiddle.reshape(-1, *twiddle.shape[-5:]).unbind(1)  # each (g, c, n/2, 2, 2)
    n_high = shape.high.bit_length() - 1
    # Level s numbers its pairs by (the s bits above it, the bits below it).
    high = [
        level.unflatten(2, (1 << s, shape.high >> (s + 1), shape.low)).movedim(4, 2)
        for s, level in enumerate(levels[:n_high])
    ]
    low = [level.unflatten(2, (shape.high, 1 << s, shape.low >> (s + 1))) for s, level in enumerate(levels[n_high:])]
    return _multiplied(high, shape.high), _multiplied(low, shape.low)


def _multiplied(levels: list[Tensor], size: int) -> Tensor:
    """The product (*, size, size) of levels (*, u, v, 2, 2), the first acting first: each mixes pairs (u, 2, v)."""
    eye = torch.eye(size, dtype=levels[0].dtype, device=levels[0].device)
    product = eye.expand(*levels[0].shape[:-4], size, size)
    for level in levels:
        pairs = product.unflatten(-2, (*level.shape[-4:-3], 2, *level.shape[-3:-2]))
        product = torch.einsum("...uvba,...uavi->...ubvi", level, pairs).flatten(-4, -2)
    return product


def _padded(x_I: Tensor, width: int) -> Tensor:
    return F.pad(x_I, (0, width - x_I.shape[-1])) if width > x_I.shape[-1] else x_I


def _kept_slots(n_kept: int, n_slots: int, device: torch.device) -> Tensor | None:
    """Which of the slots are units of the hidden width, evenly spread, so that each rank's range has its share."""
    if n_kept == n_slots:
        return None
    return torch.arange(n_kept, device=device) * n_slots // n_kept
