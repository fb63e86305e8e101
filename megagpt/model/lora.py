"""Adapters beside the linear layers of a block: scale · B A x, the only thing that learns (Hu et al. 2021).

Over the model axis an adapter is cut as its layer is, and sends nothing of its own but a gradient: the factor that
every rank holds whole meets, on each, that rank's share of the layer's outputs or inputs, so that its gradient is
summed. The input has entered the axis with the layer's, and the output leaves it with the layer's.

Shapes: I inputs, O outputs, R rank, _local a shard over the axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from megagpt.config.kernels import AUTO, Kernels
from megagpt.config.lora import TARGETS
from megagpt.inventory.lora import PART, A, B
from megagpt.model.dropout import Dropout, adapter_site
from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import copy_to
from megagpt.parallel.linear import HeadsLinear
from megagpt.parallel.parameter import Declared, part_of
from megagpt.parallel.product import product

if TYPE_CHECKING:
    from megagpt.config.lora import LoraConfig


def attach_adapters(
    block: nn.Module, declared: Declared, layer: int, axis: Axis, lora: LoraConfig, kernels: Kernels = AUTO
) -> None:
    """Give the linear layers of a block the adapters that are declared for them."""
    modules = [module for of_target in TARGETS.values() for module in of_target]
    for number, module in enumerate(modules):
        of_module = declared.at(f"{module}.{PART}")
        if of_module.parameters:
            dropout = Dropout(lora.dropout, declared.seed, adapter_site(layer, number, len(modules)), kernels)
            linear = block.get_submodule(module)
            linear.lora = Adapter(of_module, axis, lora.scale, dropout, linear)  # pyright: ignore[reportArgumentType]


class Adapter(nn.Module):
    """What is added to the product of a linear layer.

    Declared by `inventory.lora.adapter`: a (R, I), b (*, O, R).
    Shapes: x (B, T, I), as it has entered the layer → y (B, T, O): this rank's outputs, or its term of their sum.
    Comm: forward none; backward all-reduce over the axis of the gradient of the factor that is not cut.
    """

    def __init__(self, declared: Declared, axis: Axis, scale: float, dropout: Dropout, linear: nn.Module) -> None:
        super().__init__()
        self.axis, self.scale, self.dropout = axis, scale, dropout
        self.a, self.b = declared.make(A, axis), declared.make(B, axis)
        self.rows_of = linear.rows_of if isinstance(linear, HeadsLinear) else self._summed

    def forward(self, x_BTI: Tensor, sample_ids_B: Tensor | None) -> Tensor:
        z_BTR = product(self._dropped(x_BTI, sample_ids_B), self._summed(self.a)) * self.scale
        b_OR = self.rows_of(self.b)
        return product(z_BTR, b_OR.view(-1, b_OR.shape[-1]))

    def _dropped(self, x_BTI: Tensor, sample_ids_B: Tensor | None) -> Tensor:
        """Of inputs that are cut a rank draws its part of the mask, which goes input by input then."""
        if not self.dropout.active:
            return x_BTI
        assert sample_ids_B is not None, "masks are drawn by the positions of the samples"
        part = part_of(self.a)
        if part.dim is None:
            return self.dropout(x_BTI, sample_ids_B)
        x_BIT = x_BTI.transpose(1, 2).contiguous()
        return self.dropout(x_BIT, sample_ids_B, part.start * x_BTI.shape[1]).transpose(1, 2)

    def _summed(self, factor: Tensor) -> Tensor:
        """A factor whose gradient is that of all ranks."""
        return factor if part_of(factor).dim is not None else copy_to(factor, self.axis)

    def extra_repr(self) -> str:
        return f"rank {self.a.shape[0]}, scale {self.scale:g}"
