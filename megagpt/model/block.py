"""One transformer block of GPT-2: norm, attention, norm, MLP, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.config import ModelConfig
from megagpt.kernels import AUTO, Kernels
from megagpt.model.attention import Attention
from megagpt.model.dropout import Dropout, block_site
from megagpt.model.mlp import MLP
from megagpt.model.norm import Norm
from megagpt.parallel.axis import Axis


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on what is added.

    Shapes: (x_BTD, sample_ids_B) → (x_BTD, sample_ids_B): the ids travel along, for the dropout masks.
    Comm: forward two all-reduces of x over the model axis; backward two.
    Source: Radford et al. 2019 (pre-norm); Shoeybi et al. 2019, section 3.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        axis: Axis,
        seed: int,
        recompute: bool = False,
        kernels: Kernels = AUTO,
    ) -> None:
        super().__init__()
        name = f"blocks.{layer}"
        self.recompute = recompute
        self.norm_1 = Norm(config, seed, f"{name}.norm_1", kernels)
        self.attention = Attention(config, layer, axis, seed, f"{name}.attention", kernels)
        self.norm_2 = Norm(config, seed, f"{name}.norm_2", kernels)
        self.mlp = MLP(config, axis, seed, f"{name}.mlp", kernels)
        self.dropout_1 = Dropout(config.dropout_residual, seed, block_site(layer, 1), kernels)
        self.dropout_2 = Dropout(config.dropout_residual, seed, block_site(layer, 2), kernels)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x_BTD, sample_ids_B = inputs
        if self.recompute and self.training:
            # No random state to preserve: dropout masks are a function of the ids.
            x_BTD = checkpoint(self._forward, x_BTD, sample_ids_B, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BTD = self._forward(x_BTD, sample_ids_B)
        return x_BTD, sample_ids_B

    def _forward(self, x_BTD: Tensor, sample_ids_B: Tensor) -> Tensor:
        h_BTD = self.norm_1(x_BTD)
        if self.dropout_1.active:
            x_BTD = self.attention(h_BTD, sample_ids_B, epilogue=self.dropout_1.join(x_BTD, sample_ids_B))
            h_BTD = self.norm_2(x_BTD)
        else:
            h_BTD, x_BTD = self.norm_2(self.attention(h_BTD, sample_ids_B), x_BTD)
        return self.mlp(h_BTD, epilogue=self.dropout_2.join(x_BTD, sample_ids_B))
