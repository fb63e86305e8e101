"""What the factorised matrices have in common: their bias, and what follows the product.

Shapes: I inputs, O outputs, _local a shard over the axis, packs the 2 matrices of a gated unit, else absent.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import replace

from torch import Tensor, nn

from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import reduce_from
from megagpt.parallel.linear import Epilogue
from megagpt.parallel.parameter import NamedNormal, replicated, sharded


class FactorisedColumn(nn.Module, ABC):
    """y = W x + b with the outputs shared out, W a product of parameters.

    Shapes: x (*, I) replicated → y (*, packs * O_local).  bias (packs, O_local).
    """

    def __init__(self, n_outputs: int, axis: Axis, draw: NamedNormal, packs: int, bias: bool) -> None:
        super().__init__()
        self.axis, self.packs = axis, packs
        self.packed = () if packs == 1 else (packs,)
        self.bias = sharded(draw("bias", (*self.packed, n_outputs)), len(self.packed), axis) if bias else None

    def forward(self, x_I: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        y_O = self.product(x_I)
        bias_O = None if self.bias is None else self.bias.view(-1)
        if epilogue is not None:
            return epilogue(y_O, bias_O)
        return y_O if bias_O is None else y_O + bias_O

    @abstractmethod
    def product(self, x_I: Tensor) -> Tensor:
        """W x: this rank's outputs, pack by pack."""


class FactorisedRow(nn.Module, ABC):
    """y = W x + b with the inputs shared out, W a product of parameters.

    Shapes: x (*, I_local) → y (*, O) replicated.  bias (O) replicated, added once.
    """

    def __init__(self, n_outputs: int, axis: Axis, draw: NamedNormal, bias: bool) -> None:
        super().__init__()
        self.axis = axis
        self.bias = replicated(draw("bias", (n_outputs,))) if bias else None

    def forward(self, x_I_local: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        y_O = self.product(x_I_local)
        if epilogue is not None:
            return epilogue(y_O, self.bias)
        return y_O if self.bias is None else y_O + self.bias

    @abstractmethod
    def product(self, x_I_local: Tensor) -> Tensor:
        """W x, summed over the ranks."""

    def summed(self, y: Tensor) -> Tensor:
        """Comm: forward all-reduce over the axis; backward none."""
        return reduce_from(y, self.axis)


def dense_std(draw: NamedNormal, n_inputs: int) -> float:
    """Of the elements of the dense matrix, in whose place the product is."""
    return n_inputs**-0.5 if draw.std is None else draw.std


def two_factors(draw: NamedNormal, n_inputs: int, fan_ins: tuple[int, int]) -> tuple[NamedNormal, NamedNormal]:
    """Draws for two factors whose product has outputs of the variance that the dense matrix gives.

    fan_ins: numbers that one output of each factor sums. The first factor keeps the variance of its input.
    """
    first, second = fan_ins
    std = dense_std(draw, n_inputs) * math.sqrt(n_inputs / second)
    return replace(draw, std=first**-0.5), replace(draw, std=std)
