"""The two-layer MLP of a block, its hidden width shared out over the model axis."""

from __future__ import annotations

from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.kernels import AUTO, Kernels
from megagpt.model.init import Init
from megagpt.ops.activation import Kind, activation
from megagpt.parallel.axis import Axis
from megagpt.parallel.linear import ColumnParallelLinear, Epilogue, RowParallelLinear

GATES: dict[str, Kind] = {"swiglu": "silu", "geglu": "gelu"}  # what a gated unit does to its gate


class MLP(nn.Module):
    """W₂ f(W₁ x + b₁) + b₂, or with a gate W₂ (f(W₁ x + b₁) ⊙ (W₃ x + b₃)) + b₂ (Shazeer 2020).

    Shapes: x_BTD → y_BTD.  Comm: those of its column- and row-parallel layers; none where it is to be `partial`.
    """

    def __init__(
        self,
        config: ModelConfig,
        axis: Axis,
        init: Init,
        name: str,
        kernels: Kernels = AUTO,
        *,
        partial: bool = False,
    ) -> None:
        super().__init__()
        self.kind: Kind = GATES.get(config.activation, config.activation)  # pyright: ignore[reportAttributeAccessIssue]
        self.gated, self.kernels = config.gated, kernels["activation"]
        D, F, bias = config.d_model, config.ff_width, config.bias_mlp
        packs = 2 if self.gated else 1
        self.up = ColumnParallelLinear(D, F, axis, init.matrix(f"{name}.up"), packs=packs, bias=bias, copied=partial)
        self.down = RowParallelLinear(F, D, axis, init.residual(f"{name}.down"), bias=bias, partial=partial)

    def forward(self, x_BTD: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        return self.down(self.up(x_BTD, epilogue=self._activate), epilogue)

    def _activate(self, x_BTF: Tensor, bias_F: Tensor | None) -> Tensor:
        return activation(x_BTF, bias_F, kind=self.kind, gated=self.gated, kernels=self.kernels)
