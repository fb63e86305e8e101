"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang & Sennrich 2019), replicated over the model axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, overload

from torch import Tensor, nn

from megagpt.config.kernels import AUTO, Kernels
from megagpt.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import Declared

if TYPE_CHECKING:
    from megagpt.config import ModelConfig


class Norm(nn.Module):
    """The norm that the configuration names.

    Shapes: x (*, D) → norm(x) (*, D); with a residual (*, D) → (norm(x + residual), x + residual).
    Comm: none; its gradients are equal on every rank of the model axis.
    """

    def __init__(self, config: ModelConfig, declared: Declared, kernels: Kernels = AUTO) -> None:
        super().__init__()
        self.centers = config.norm == "layernorm"
        self.eps, self.kernels = config.norm_eps, kernels["norm"]
        self.weight = declared.make("weight", SINGLE)
        self.bias = declared.make_if_any("bias", SINGLE)

    @overload
    def forward(self, x_D: Tensor) -> Tensor: ...
    @overload
    def forward(self, x_D: Tensor, residual_D: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(self, x_D: Tensor, residual_D: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual_D is None:
            if self.centers:
                return layer_norm(x_D, self.weight, self.bias, self.eps, kernels=self.kernels)
            return rms_norm(x_D, self.weight, self.eps, kernels=self.kernels)
        if self.centers:
            return add_layer_norm(x_D, residual_D, self.weight, self.bias, self.eps, kernels=self.kernels)
        return add_rms_norm(x_D, residual_D, self.weight, self.eps, kernels=self.kernels)
