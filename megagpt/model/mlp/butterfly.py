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
l (low) what the two halves of the bits count to: n = h l. K, J, H, W as in monarch.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megagpt.errors import divisors, require
from megagpt.inventory.parameter import Init, Kept, Parameter, Parameters
from megagpt.model.mlp.kind import Direction, Product, Weights, grid_product, truncated

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megagpt.parallel.axis import Axis
    from megagpt.parallel.linear import Edges


@dataclass(frozen=True)
class Size:
    """A butterfly between the residual stream (its size rounded up to n = 2^m) and the hidden width (c times n).

    An index of the n consists of m bits. The upper half of the levels mixes the high bits, which count to `high`, the
    lower half the low bits, which count to `low`: so that each half is one factor of a grid of rank 1.
    """

    n_residual: int
    n_hidden: int

    @property
    def levels(self) -> int:
        """m, 2 or more: n = 2^m is the first power of two that the residual stream fits in."""
        return max(2, (self.n_residual - 1).bit_length())

    @property
    def size(self) -> int:
        """n."""
        return 1 << self.levels

    @property
    def stacks(self) -> int:
        """c, butterflies side by side."""
        return -(-self.n_hidden // self.size)

    @property
    def high(self) -> int:
        """What the high bits count to; tensor parallelism shares these out."""
        return 1 << (self.levels + 1) // 2

    @property
    def low(self) -> int:
        """What the low bits count to."""
        return self.size // self.high

    @property
    def kept_residual(self) -> int:
        """Low indices in use: the residual stream fills n by groups of `high`."""
        return -(-self.n_residual // self.high)

    @property
    def kept_hidden(self) -> int:
        """Low indices in use on the hidden side, in each of `stacks * high` groups."""
        return -(-self.n_hidden // (self.stacks * self.high))

    @property
    def middle(self) -> int:
        """Numbers between the two factors that the levels are multiplied into."""
        return self.stacks * self.high * self.kept_residual

    @property
    def grid_numbers(self) -> int:
        """Numbers of these two factors, as far as they are used."""
        return self.middle * (self.high + self.kept_hidden)


class Butterfly(Product):
    """twiddle (packs, m, c, n/2, 2, 2) up, (m, c, n/2, 2, 2) down, those of the transpose; whole on every rank.

    Comm: up: `edges.enter` of x, and an all-reduce of the gradient of twiddle over the axis. down: `edges.leave` of the
    output, and the same of twiddle.
    Source: Dao et al. 2019, section 3; 2022, section 3.1.
    """

    @property
    def shape(self) -> Size:
        """Of both matrices."""
        return Size(self.model.d_model, self.model.ff_width)

    def check_tp(self, tp: int) -> None:
        super().check_tp(tp)
        most = self.shape.high
        choices = ", ".join(map(str, divisors(most)))
        got = f"parallel.tp={tp} with model.mlp=butterfly of d_model={self.model.d_model}"
        require(most % tp == 0, got, f"must be a power of two, at most {most}", f"try {choices}", "parallel.tp")

    def factors(self, direction: Direction, std: float) -> Parameters:
        """A butterfly of rotations keeps norms: times √n std, outputs have the variance that a dense W gives."""
        shape, packed = self.shape, self.packed if direction == "up" else ()
        scale = (std * math.sqrt(shape.size)) ** (1 / shape.levels)
        twiddle = (*packed, shape.levels, shape.stacks, shape.size // 2, 2, 2)
        n_maps = self.packs if direction == "up" else 1
        flops = 2 * n_maps * shape.grid_numbers  # tokens go through the two factors that the levels multiply to
        return {"twiddle": Parameter(twiddle, "table", Init("rotations", scale), flops=flops)}

    def kept(self) -> tuple[Kept, ...]:
        """Beside the middle, the copies that are made where widths do not fill a butterfly evenly."""
        shape, D, F = self.shape, self.model.d_model, self.model.ff_width
        slots, padded = shape.stacks * shape.high * shape.kept_hidden, shape.kept_residual * shape.high
        return (
            Kept("between the factors", (self.packs + 1) * shape.middle),
            Kept("hidden units among slots", slots if slots != F else 0),
            Kept("padded residual stream", padded if padded != D else 0, ways=1),
        )

    def multiply_up(self, weights: Weights, x_I: Tensor, axis: Axis, edges: Edges) -> Tensor:
        import torch.nn.functional as F  # computes: what is declared is read without torch

        first_KJW, second_JHK = local_grid(weights["twiddle"], self.shape, axis)
        x_I, width = edges.enter(x_I, axis), first_KJW.shape[0] * first_KJW.shape[2]
        x_I = F.pad(x_I, (0, width - x_I.shape[-1])) if width > x_I.shape[-1] else x_I
        y = grid_product(x_I, first_KJW.to(x_I.dtype), second_JHK.to(x_I.dtype))
        slots = y.unflatten(-1, (self.packs, -1))
        kept = _kept_slots(self.model.ff_width // axis.size, slots.shape[-1], y.device)
        return y if kept is None else slots.index_select(-1, kept).flatten(-2)

    def multiply_down(self, weights: Weights, x_I_local: Tensor, axis: Axis, edges: Edges) -> Tensor:
        first_KJW, second_JHK = local_grid(weights["twiddle"], self.shape, axis)
        J, H, _ = second_JHK.shape
        kept = _kept_slots(x_I_local.shape[-1], J * H, x_I_local.device)
        if kept is not None:
            slots = x_I_local.new_zeros(*x_I_local.shape[:-1], J * H)
            x_I_local = slots.index_copy(-1, kept, x_I_local)
        # The transpose of a grid has the transposed factors, in the other order.
        first, second = second_JHK.transpose(1, 2), first_KJW.transpose(1, 2)
        y = grid_product(x_I_local, first.to(x_I_local.dtype), second.to(x_I_local.dtype))
        return edges.leave(y[..., : self.shape.n_residual], axis)

    def project(self, weight: Tensor, direction: Direction) -> dict[str, Tensor]:
        """Split in two factors like a Monarch matrix, these again, and so on: exact for what is a butterfly.

        Rows and columns of the n that stand for no unit are taken as zero: that scales rows and columns of a butterfly,
        which leaves it one.
        """
        import torch  # likewise

        shape, weight_up = self.shape, weight if direction == "up" else weight.T
        slots = weight_up.new_zeros(shape.high * shape.stacks * shape.kept_hidden, shape.kept_residual * shape.high)
        n_hidden, n_residual = weight_up.shape
        slots[torch.arange(n_hidden) * len(slots) // n_hidden, :n_residual] = weight_up
        slots_hcllh = slots.view(shape.high, shape.stacks, shape.kept_hidden, shape.kept_residual, shape.high)
        stacks = []
        for slots_hllh in slots_hcllh.unbind(1):
            whole = torch.zeros(shape.high, shape.low, shape.high, shape.low, dtype=torch.float64)  # index: (high, low)
            whole[:, : shape.kept_hidden, :, : shape.kept_residual] = slots_hllh.transpose(2, 3)
            levels = _levels(whole.view(shape.size, shape.size))
            stacks.append(torch.stack([level.flatten(-4, -3) for level in levels]))
        return {"twiddle": torch.stack(stacks, dim=1)}


def local_grid(twiddle: Tensor, shape: Size, axis: Axis) -> tuple[Tensor, Tensor]:
    """The factors of this rank's rows of the up grid: first (K, J, W), second (J, H, K).

    K is l, as far as the residual stream uses it, W h; J is (packs, this rank's range of h, c), H what is used of l.
    """
    import torch  # likewise

    from megagpt.parallel.collectives import copy_to  # likewise

    twiddle = copy_to(twiddle.to(torch.promote_types(twiddle.dtype, torch.float32)), axis)
    high_gclhh, low_gchll = merged_levels(twiddle, shape)
    n_mine, used, kept = shape.high // axis.size, shape.kept_residual, shape.kept_hidden
    first = high_gclhh[:, :, :used].narrow(3, n_mine * axis.rank, n_mine).permute(2, 0, 3, 1, 4)
    second = low_gchll[..., :kept, :used].narrow(2, n_mine * axis.rank, n_mine).transpose(1, 2)
    return first.flatten(1, 3), second.flatten(0, 2)


def merged_levels(twiddle: Tensor, shape: Size) -> tuple[Tensor, Tensor]:
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
    import torch  # likewise

    eye = torch.eye(size, dtype=levels[0].dtype, device=levels[0].device)
    product = eye.expand(*levels[0].shape[:-4], size, size)
    for level in levels:
        pairs = product.unflatten(-2, (*level.shape[-4:-3], 2, *level.shape[-3:-2]))
        product = torch.einsum("...uvba,...uavi->...ubvi", level, pairs).flatten(-4, -2)
    return product


def _kept_slots(n_kept: int, n_slots: int, device: torch.device) -> Tensor | None:
    """Which of the slots are units of the hidden width, evenly spread, so that each rank's range has its share."""
    import torch  # likewise

    if n_kept == n_slots:
        return None
    return torch.arange(n_kept, device=device) * n_slots // n_kept


def _levels(whole: Tensor) -> list[Tensor]:
    """Of butterflies (*, n, n): 2x2 matrices level by level, (*, u, v, 2, 2), u counting the bits above, v below.

    Source: Le, Zheng, Riccietti & Gribonval 2022, "Fast learning of fast transforms, with guarantees", section 3.
    """
    n = whole.shape[-1]
    if n == 2:
        return [whole[..., None, None, :, :]]
    high = 1 << n.bit_length() // 2  # half of the bits, rounded up: as Butterfly.high, though any split would do
    blocks = whole.unflatten(-1, (high, -1)).unflatten(-3, (high, -1))  # out: high, low; in: high, low
    left, right = truncated(blocks.movedim(-1, -3), 1)  # by (high out, low in), each of (low out, high in)
    of_high = right.squeeze(-2).transpose(-3, -2)  # by low in: (high out, high in)
    of_low = left.squeeze(-1).transpose(-2, -1)  # by high out: (low out, low in)
    upper = [level.movedim(-5, -3).flatten(-4, -3) for level in _levels(of_high)]
    return upper + [level.flatten(-5, -4) for level in _levels(of_low)]
