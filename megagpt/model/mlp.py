"""The two-layer MLP of a block, its hidden width shared out over the model axis."""

from __future__ import annotations

from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.config.kernels import AUTO, Kernels
from megagpt.model.factorised import down_matrix, up_matrix
from megagpt.model.init import Init
from megagpt.ops.activation import Kind, activation
from megagpt.parallel.axis import Axis
from megagpt.parallel.linear import Epilogue

GATES: dict[str, Kind] = {"swiglu": "silu", "geglu": "gelu"}  # what a gated unit does to its gate


class MLP(nn.Module):
    """W₂ f(W₁ x + b₁) + b₂, or with a gate W₂ (f(W₁ x + b₁) ⊙ (W₃ x + b₃)) + b₂ (Shazeer 2020).

    Shapes: x_BTD → y_BTD.  Comm: those of its column- and row-parallel matrices (factorised.py); none where it is to be
    `partial`.
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
        self.up = up_matrix(config, axis, init.matrix(f"{name}.up"), partial=partial)
        self.down = down_matrix(config, axis, init.residual(f"{name}.down"), partial=partial)

    def forward(self, x_BTD: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        return self.down(self.up(x_BTD, epilogue=self._activate), epilogue)

    def _activate(self, x_BTF: Tensor, bias_F: Tensor | None) -> Tensor:
        return activation(x_BTF, bias_F, kind=self.kind, gated=self.gated, kernels=self.kernels)
