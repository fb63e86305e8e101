"""Linear layers whose weight is shared out over a mesh axis (Shoeybi et al. 2019, section 3).

Shapes: I inputs, O outputs, _local a shard over the axis.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import copy_to, reduce_from
from megagpt.parallel.parameter import DEFAULT_DRAW, Draw, replicated, sharded

# (x Wᵀ, b or None) -> what takes the place of x Wᵀ + b: fuses the bias with what follows it. It runs inside of
# the layer's forward, since ZeRO-3 gathers a layer's parameters for no longer than that.
Epilogue = Callable[[Tensor, Tensor | None], Tensor]


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with the outputs shared out: each rank computes O / axis.size of them.

    Shapes: x (*, I) replicated → y (*, O_local).  weight (O_local, I), bias (O_local).
    With `packs` > 1 there are that many matrices, their outputs side by side: weight (packs, O_local, I), bias
    (packs, O_local), y (*, packs * O_local), so that a rank's part of a gate comes with its part of the value.
    Comm: forward none; backward all-reduce of the input's gradient over the axis, unless the input is `copied`: has
    come through `copy_to` already, for several layers at once.
    """

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        axis: Axis,
        draw: Draw = DEFAULT_DRAW,
        *,
        packs: int = 1,
        bias: bool = True,
        copied: bool = False,
    ) -> None:
        super().__init__()
        _require_divisible("outputs", n_outputs, axis)
        self.axis, self.copied = axis, copied
        packed = () if packs == 1 else (packs,)
        self.weight = sharded(draw("weight", (*packed, n_outputs, n_inputs)), len(packed), axis)
        self.bias = sharded(draw("bias", (*packed, n_outputs)), len(packed), axis) if bias else None

    def forward(self, x_I: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        x_I = x_I if self.copied else copy_to(x_I, self.axis)
        weight_OI = self.weight.view(-1, self.weight.shape[-1])
        bias_O = None if self.bias is None else self.bias.view(-1)
        if epilogue is None:
            return F.linear(x_I, weight_OI, bias_O)
        return epilogue(F.linear(x_I, weight_OI), bias_O)

    def extra_repr(self) -> str:
        return _sizes(self.weight)


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with the inputs shared out: each rank multiplies its I / axis.size of them, and the sum is taken.

    Shapes: x (*, I_local) → y (*, O) replicated.  weight (O, I_local), bias (O) replicated, added once, after the sum.
    Comm: forward all-reduce of the output over the axis, unless it is to be `partial`: this rank's term of the sum
    (then there can be no bias); backward none.
    """

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        axis: Axis,
        draw: Draw = DEFAULT_DRAW,
        *,
        bias: bool = True,
        partial: bool = False,
    ) -> None:
        super().__init__()
        _require_divisible("inputs", n_inputs, axis)
        if partial and bias:
            raise ValueError("got partial sums with a bias, which would be added on every rank; wanted bias=False")
        self.axis, self.partial = axis, partial
        self.weight = sharded(draw("weight", (n_outputs, n_inputs)), 1, axis)
        self.bias = replicated(draw("bias", (n_outputs,))) if bias else None

    def forward(self, x_I_local: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        if epilogue is None and (self.axis.size == 1 or self.partial):
            return F.linear(x_I_local, self.weight, self.bias)
        y_O = reduce_from(F.linear(x_I_local, self.weight), self.axis)
        if epilogue is not None:
            return epilogue(y_O, self.bias)
        return y_O if self.bias is None else y_O + self.bias

    def extra_repr(self) -> str:
        return _sizes(self.weight)


def _require_divisible(what: str, n: int, axis: Axis) -> None:
    if n % axis.size:
        raise ValueError(f"got {n} {what} on an axis of {axis.size} processes, wanted a multiple of {axis.size}")


def _sizes(weight: nn.Parameter) -> str:
    return f"local {tuple(weight.shape)} of {weight.part.shape}"  # type: ignore[attr-defined]
