"""The two-layer MLP of a block, its hidden width shared out over the model axis."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.parallel.axis import Axis
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megagpt.parallel.parameter import NamedNormal


class MLP(nn.Module):
    """W₂ gelu(W₁ x + b₁) + b₂.

    Shapes: x_BTD → y_BTD.  Comm: those of its column- and row-parallel layers.
    """

    def __init__(self, config: ModelConfig, axis: Axis, seed: int, name: str) -> None:
        super().__init__()
        std, residual_std = config.init_std, config.init_std / math.sqrt(2 * config.n_layers)
        self.approximate = "tanh" if config.activation == "gelu_tanh" else "none"
        self.up = ColumnParallelLinear(config.d_model, config.ff_width, axis, NamedNormal(seed, f"{name}.up", std))
        self.down = RowParallelLinear(
            config.ff_width, config.d_model, axis, NamedNormal(seed, f"{name}.down", residual_std)
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x_BTD), approximate=self.approximate))
