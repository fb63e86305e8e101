"""The two-layer MLP of a block, its hidden width shared out over the model axis."""

from __future__ import annotations

import math

from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.kernels import AUTO, Kernels
from megagpt.ops.activation import Kind, activation
from megagpt.parallel.axis import Axis
from megagpt.parallel.linear import ColumnParallelLinear, Epilogue, RowParallelLinear
from megagpt.parallel.parameter import NamedNormal

GATES: dict[str, Kind] = {"swiglu": "silu", "geglu": "gelu"}  # what a gated unit does to its gate


class MLP(nn.Module):
    """W₂ f(W₁ x + b₁) + b₂, or with a gate W₂ (f(W₁ x + b₁) ⊙ (W₃ x + b₃)) + b₂ (Shazeer 2020).

    Shapes: x_BTD → y_BTD.  Comm: those of its column- and row-parallel layers.
    """

    def __init__(self, config: ModelConfig, axis: Axis, seed: int, name: str, kernels: Kernels = AUTO) -> None:
        super().__init__()
        std, residual_std = config.init_std, config.init_std / math.sqrt(2 * config.n_layers)
        self.kind: Kind = GATES.get(config.activation, config.activation)  # pyright: ignore[reportAttributeAccessIssue]
        self.gated, self.kernels = config.gated, kernels["activation"]
        draw = NamedNormal(seed, f"{name}.up", std)
        self.up = ColumnParallelLinear(config.d_model, config.ff_width, axis, draw, packs=2 if self.gated else 1)
        self.down = RowParallelLinear(
            config.ff_width, config.d_model, axis, NamedNormal(seed, f"{name}.down", residual_std)
        )

    def forward(self, x_BTD: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        return self.down(self.up(x_BTD, epilogue=self._activate), epilogue)

    def _activate(self, x_BTF: Tensor, bias_F: Tensor) -> Tensor:
        return activation(x_BTF, bias_F, kind=self.kind, gated=self.gated, kernels=self.kernels)
