"""The two-layer MLP of a block, its hidden width shared out over the model axis.

Shapes: I inputs, O outputs, _local a shard over the axis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from megagpt.config.kernels import AUTO, Kernels
from megagpt.model.mlp import MLPS
from megagpt.model.mlp.kind import Direction, Product
from megagpt.ops.activation import Kind, activation
from megagpt.parallel.axis import Axis
from megagpt.parallel.linear import OPEN, SUMMED, ColumnParallelLinear, Edges, Epilogue, RowParallelLinear
from megagpt.parallel.parameter import Declared

if TYPE_CHECKING:
    from megagpt.config import ModelConfig

GATES: dict[str, Kind] = {"swiglu": "silu", "geglu": "gelu"}  # what a gated unit does to its gate


class MLP(nn.Module):
    """W₂ f(W₁ x + b₁) + b₂, or with a gate W₂ (f(W₁ x + b₁) ⊙ (W₃ x + b₃)) + b₂ (Shazeer 2020).

    Shapes: x_BTD → y_BTD.  Comm: `edges.enter` and `edges.leave`; of x and y, unless the kind of the matrices says
    otherwise.
    """

    def __init__(
        self, config: ModelConfig, axis: Axis, declared: Declared, kernels: Kernels = AUTO, edges: Edges = SUMMED
    ) -> None:
        super().__init__()
        self.kind: Kind = GATES.get(config.activation, config.activation)  # pyright: ignore[reportAttributeAccessIssue]
        self.gated, self.kernels = config.gated, kernels["activation"]
        self.up = mlp_matrix("up", config, axis, declared.at("up"), edges)
        self.down = mlp_matrix("down", config, axis, declared.at("down"), edges)

    def forward(self, x_BTD: Tensor, epilogue: Epilogue | None = None, sample_ids_B: Tensor | None = None) -> Tensor:
        return self.down(self.up(x_BTD, self._activate, sample_ids_B), epilogue, sample_ids_B)

    def _activate(self, x_BTF: Tensor, bias_F: Tensor | None) -> Tensor:
        return activation(x_BTF, bias_F, kind=self.kind, gated=self.gated, kernels=self.kernels)


def mlp_matrix(
    direction: Direction, config: ModelConfig, axis: Axis, declared: Declared, edges: Edges = SUMMED
) -> nn.Module:
    """up: from the residual stream to this rank's part of the hidden width, with a gate two of them side by side; or
    down: back. Shapes, epilogue and bias are those of Column- and RowParallelLinear, whatever kind of matrix it is.

    Raises UserError where so many ranks cannot share that kind.
    """
    kind = MLPS[config.mlp](config)
    kind.check_tp(axis.size)  # evaluation and generation take as many ranks as they are given, without a plan
    if isinstance(kind, Product):
        return ProductLinear(kind, direction, axis, declared, edges)
    return (ColumnParallelLinear if direction == "up" else RowParallelLinear)(declared, axis, edges)


class ProductLinear(nn.Module):
    """y = W x + b, W a product of parameters; what follows the product is that of a dense layer.

    Shapes: up: x (*, I) replicated → y (*, packs * O_local).  down: x (*, I_local) → y (*, O) replicated.
    """

    def __init__(self, kind: Product, direction: Direction, axis: Axis, declared: Declared, edges: Edges) -> None:
        super().__init__()
        if edges is OPEN:
            raise ValueError("got terms of a sum of a product of matrices, which sums in between; wanted a dense one")
        self.axis, self.edges = axis, edges
        self.multiply = kind.multiply_up if direction == "up" else kind.multiply_down
        self.bias = declared.make_if_any("bias", axis)
        for name in declared.parameters:
            if name != "bias":
                self.register_parameter(name, declared.make(name, axis))

    def forward(self, x_I: Tensor, epilogue: Epilogue | None = None, sample_ids_B: Tensor | None = None) -> Tensor:
        y_O = self.multiply(dict(self.named_parameters()), x_I, self.axis, self.edges)
        bias_O = None if self.bias is None else self.bias.view(-1)
        if epilogue is not None:
            return epilogue(y_O, bias_O)
        return y_O if bias_O is None else y_O + bias_O
