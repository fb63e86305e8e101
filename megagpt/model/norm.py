"""LayerNorm (Ba et al. 2016), replicated over the model axis."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.parallel.parameter import Draw, replicated


class LayerNorm(nn.Module):
    """Shapes: x (*, D) → (*, D). Comm: none; its gradients are equal on every rank of the model axis."""

    def __init__(self, d_model: int, eps: float, draw: Draw) -> None:
        super().__init__()
        self.eps = eps
        self.weight = replicated(draw("gain", (d_model,)))
        self.bias = replicated(draw("bias", (d_model,)))

    def forward(self, x_D: Tensor) -> Tensor:
        return F.layer_norm(x_D, self.weight.shape, self.weight, self.bias, self.eps)
