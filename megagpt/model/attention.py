"""Causal multi-head self-attention, heads shared out over the model axis.

Shapes: B batch, T time, D model, H this rank's heads, K head width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.model.dropout import Dropout, block_site
from megagpt.parallel.axis import Axis
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megagpt.parallel.parameter import NamedNormal


class Attention(nn.Module):
    """softmax(q kᵀ / √K, causal) v per head, then a projection back to the residual stream.

    Shapes: x_BTD → y_BTD.  Comm: those of its column- and row-parallel layers.
    Rows of qkv.weight are ordered head by head, [q, k, v] within a head, so that one range of rows is one rank's heads.
    Source: Vaswani et al. 2017; Shoeybi et al. 2019, section 3.
    """

    def __init__(self, config: ModelConfig, layer: int, axis: Axis, seed: int, name: str) -> None:
        super().__init__()
        d_inner = config.n_heads * config.head_width
        self.d_head = config.head_width
        self.first_head = config.n_heads // axis.size * axis.rank
        std, residual_std = config.init_std, config.init_std / math.sqrt(2 * config.n_layers)
        self.qkv = ColumnParallelLinear(config.d_model, 3 * d_inner, axis, NamedNormal(seed, f"{name}.qkv", std))
        self.out = RowParallelLinear(d_inner, config.d_model, axis, NamedNormal(seed, f"{name}.out", residual_std))
        self.dropout = Dropout(config.dropout_attention, seed, block_site(layer, 0))

    def forward(self, x_BTD: Tensor, sample_ids_B: Tensor) -> Tensor:
        qkv_BTH3K = self.qkv(x_BTD).unflatten(-1, (-1, 3, self.d_head))
        q_BHTK, k_BHTK, v_BHTK = qkv_BTH3K.permute(3, 0, 2, 1, 4)
        if self.dropout.active:
            y_BHTK = self._attend_with_dropout(q_BHTK, k_BHTK, v_BHTK, sample_ids_B)
        else:
            y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))

    def _attend_with_dropout(self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, sample_ids_B: Tensor) -> Tensor:
        """The same in plain steps: flash attention draws its own masks, which would depend on the layout."""
        T = q_BHTK.shape[2]
        scores_BHTT = (q_BHTK / math.sqrt(self.d_head)) @ k_BHTK.transpose(-2, -1)
        future_TT = torch.ones(T, T, dtype=torch.bool, device=q_BHTK.device).triu(1)
        p_BHTT = scores_BHTT.masked_fill(future_TT, -torch.inf).softmax(-1)
        return self.dropout(p_BHTT, sample_ids_B, offset=self.first_head * T * T) @ v_BHTK
