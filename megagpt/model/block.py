"""One transformer block of GPT-2: norm, attention, norm, MLP, each added to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megagpt.config import ModelConfig
from megagpt.model.attention import Attention
from megagpt.model.dropout import Dropout, block_site
from megagpt.model.mlp import MLP
from megagpt.model.norm import LayerNorm
from megagpt.parallel.axis import Axis
from megagpt.parallel.parameter import NamedNormal


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on what is added.

    Shapes: (x_BTD, sample_ids_B) → (x_BTD, sample_ids_B): the ids travel along, for the dropout masks.
    Comm: forward two all-reduces of x over the model axis; backward two.
    Source: Radford et al. 2019 (pre-norm); Shoeybi et al. 2019, section 3.
    """

    def __init__(self, config: ModelConfig, layer: int, axis: Axis, seed: int, recompute: bool = False) -> None:
        super().__init__()
        name = f"blocks.{layer}"
        self.recompute = recompute
        self.norm_1 = LayerNorm(config.d_model, config.norm_eps, NamedNormal(seed, f"{name}.norm_1"))
        self.attention = Attention(config, layer, axis, seed, f"{name}.attention")
        self.norm_2 = LayerNorm(config.d_model, config.norm_eps, NamedNormal(seed, f"{name}.norm_2"))
        self.mlp = MLP(config, axis, seed, f"{name}.mlp")
        self.dropout_1 = Dropout(config.dropout_residual, seed, block_site(layer, 1))
        self.dropout_2 = Dropout(config.dropout_residual, seed, block_site(layer, 2))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x_BTD, sample_ids_B = inputs
        if self.recompute and self.training:
            # No random state to preserve: dropout masks are a function of the ids.
            x_BTD = checkpoint(self._forward, x_BTD, sample_ids_B, use_reentrant=False, preserve_rng_state=False)
        else:
            x_BTD = self._forward(x_BTD, sample_ids_B)
        return x_BTD, sample_ids_B

    def _forward(self, x_BTD: Tensor, sample_ids_B: Tensor) -> Tensor:
        x_BTD = x_BTD + self.dropout_1(self.attention(self.norm_1(x_BTD), sample_ids_B), sample_ids_B)
        return x_BTD + self.dropout_2(self.mlp(self.norm_2(x_BTD)), sample_ids_B)
