"""Linear layers whose weight is shared out over a mesh axis (Shoeybi et al. 2019, section 3).

Each may have an adapter, `lora` (model/lora.py), which adds to the product; it draws by the positions of the samples.

Shapes: I inputs, O outputs, _local a shard over the axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import copy_to, reduce_from
from megagpt.parallel.parameter import Declared
from megagpt.parallel.product import product

# (x Wᵀ, b or None) -> what takes the place of x Wᵀ + b: fuses the bias with what follows it. It runs inside of
# the layer's forward, since ZeRO-3 gathers a layer's parameters for no longer than that.
Epilogue = Callable[[Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Edges:
    """What happens to activations where they enter layers that are shared out over an axis, and where they leave them.

    enter: from what is equal on all ranks to the input of each; leave: from each rank's share to the output of all.
    """

    enter: Callable[[Tensor, Axis], Tensor]
    leave: Callable[[Tensor, Axis], Tensor]


def _as_it_is(x: Tensor, axis: Axis) -> Tensor:
    return x


SUMMED = Edges(copy_to, reduce_from)
"""Each layer by itself: a gradient's all-reduce at its input, an all-reduce of its output."""
OPEN = Edges(_as_it_is, _as_it_is)
"""Whoever holds several layers enters and leaves them at once: outputs are this rank's term of a sum."""


class ColumnParallelLinear(nn.Module):
    """y = x Wᵀ + b with the outputs shared out: each rank computes O / axis.size of them.

    Declared by `inventory.parameter.column`: weight (O, I), bias (O); or several matrices side by side, weight
    (packs, O, I), bias (packs, O), y (*, packs * O_local), so that a rank's part of a gate comes with its part of the
    value.
    Shapes: x (*, I) replicated → y (*, O_local).
    Comm: `edges.enter` of the input: by default forward none; backward all-reduce of its gradient over the axis.
    """

    def __init__(self, declared: Declared, axis: Axis, edges: Edges = SUMMED) -> None:
        super().__init__()
        weight = declared.parameters["weight"]
        _require_divisible("outputs", weight.shape[-2], axis)
        self.axis, self.edges = axis, edges
        self.weight = declared.make("weight", axis)
        self.bias = declared.make_if_any("bias", axis)
        self.lora: nn.Module | None = None

    def forward(self, x_I: Tensor, epilogue: Epilogue | None = None, sample_ids_B: Tensor | None = None) -> Tensor:
        x_I = self.edges.enter(x_I, self.axis)
        weight_OI = self.weight.view(-1, self.weight.shape[-1])
        bias_O = None if self.bias is None else self.bias.view(-1)
        if epilogue is None:
            return _adapted(product(x_I, weight_OI, bias_O), x_I, self.lora, sample_ids_B)
        return epilogue(_adapted(product(x_I, weight_OI), x_I, self.lora, sample_ids_B), bias_O)

    def extra_repr(self) -> str:
        return _sizes(self.weight)


class RowParallelLinear(nn.Module):
    """y = x Wᵀ + b with the inputs shared out: each rank multiplies its I / axis.size of them, and the sum is taken.

    Declared by `inventory.parameter.row`: weight (O, I), bias (O), whole on each rank, added once, after the sum.
    Shapes: x (*, I_local) → y (*, O) replicated.
    Comm: `edges.leave` of the output: by default forward all-reduce over the axis; backward none.
    """

    def __init__(self, declared: Declared, axis: Axis, edges: Edges = SUMMED) -> None:
        super().__init__()
        _require_divisible("inputs", declared.parameters["weight"].shape[-1], axis)
        if edges is OPEN and "bias" in declared.parameters:
            raise ValueError("got terms of a sum with a bias, which would be added on every rank; wanted no bias")
        self.axis, self.edges = axis, edges
        self.weight = declared.make("weight", axis)
        self.bias = declared.make_if_any("bias", axis)
        self.lora: nn.Module | None = None

    def forward(
        self, x_I_local: Tensor, epilogue: Epilogue | None = None, sample_ids_B: Tensor | None = None
    ) -> Tensor:
        if epilogue is None and self.axis.size == 1:
            return _adapted(product(x_I_local, self.weight, self.bias), x_I_local, self.lora, sample_ids_B)
        term_O = _adapted(product(x_I_local, self.weight), x_I_local, self.lora, sample_ids_B)
        y_O = self.edges.leave(term_O, self.axis)
        if epilogue is not None:
            return epilogue(y_O, self.bias)
        return y_O if self.bias is None else y_O + self.bias

    def extra_repr(self) -> str:
        return _sizes(self.weight)


class HeadsLinear(nn.Module):
    """y = x Wᵀ + b for this rank's heads: its share of them or, where there are more ranks than heads, its one head.

    x has entered the axis already, which queries and keys do together: one all-reduce of its gradient for both.
    With fewer heads than ranks every rank holds all of the weight, and neighbours use the same head of it: rank r of n
    the head r * n_heads // n. Its gradient is summed over the axis, so that it is whole, and equal, on each rank.

    Declared by `inventory.parameter.column` with heads.
    Shapes: x (*, I) → y (*, H_local * R), H_local at least 1.  weight (H_local * R, I) or whole (H * R, I), bias alike.
    Comm: forward none; backward, for a whole weight, all-reduce of its gradient over the axis.
    Source: Shazeer 2019 (multi-query); Ainslie et al. 2023 (grouped-query).
    Raises ValueError unless the number of heads divides the axis or the other way round.
    """

    def __init__(self, declared: Declared, axis: Axis) -> None:
        super().__init__()
        weight = declared.parameters["weight"]
        n_heads = weight.heads
        assert n_heads is not None, declared.name
        if n_heads % axis.size and axis.size % n_heads:
            raise ValueError(f"got {n_heads} heads on an axis of {axis.size} processes, wanted one to divide the other")
        self.axis, self.n_rows = axis, weight.shape[0] // n_heads
        self.head = axis.rank * n_heads // axis.size if n_heads < axis.size else None
        self.weight = declared.make("weight", axis)
        self.bias = declared.make_if_any("bias", axis)
        self.lora: nn.Module | None = None

    def forward(self, x_I: Tensor, sample_ids_B: Tensor | None = None) -> Tensor:
        y_O = product(x_I, self.rows_of(self.weight), None if self.bias is None else self.rows_of(self.bias))
        return _adapted(y_O, x_I, self.lora, sample_ids_B)

    def rows_of(self, parameter: Tensor) -> Tensor:
        """Those of this rank's heads, of a parameter that has the weight's rows."""
        if self.head is None:
            return parameter
        return copy_to(parameter, self.axis).narrow(0, self.head * self.n_rows, self.n_rows)


def _adapted(y_O: Tensor, x_I: Tensor, lora: nn.Module | None, sample_ids_B: Tensor | None) -> Tensor:
    return y_O if lora is None else y_O + lora(x_I, sample_ids_B)


def _require_divisible(what: str, n: int, axis: Axis) -> None:
    if n % axis.size:
        raise ValueError(f"got {n} {what} on an axis of {axis.size} processes, wanted a multiple of {axis.size}")


def _sizes(weight: nn.Parameter) -> str:
    return f"local {tuple(weight.shape)} of {weight.part.shape}"  # type: ignore[attr-defined]
