"""Causal multi-head self-attention, heads shared out over the model axis.

Shapes: B batch, T time, D model, H this rank's heads, K head width, X the 3 of [q, k, v].
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.kernels import AUTO, Kernels
from megagpt.model.dropout import Dropout, block_site
from megagpt.model.init import Init
from megagpt.model.position import Alibi, Rotary
from megagpt.ops.softmax import attention_softmax
from megagpt.parallel.axis import Axis
from megagpt.parallel.linear import ColumnParallelLinear, Epilogue, RowParallelLinear


class Attention(nn.Module):
    """softmax(q kᵀ / √K + position bias, causal) v per head, then a projection back to the residual stream.

    Shapes: x_BTD → y_BTD.  Comm: those of its column- and row-parallel layers.
    Rows of qkv.weight are ordered head by head, [q, k, v] within a head, so that one range of rows is one rank's heads.
    Source: Vaswani et al. 2017; Shoeybi et al. 2019, section 3.
    """

    def __init__(
        self, config: ModelConfig, layer: int, axis: Axis, init: Init, name: str, kernels: Kernels = AUTO
    ) -> None:
        super().__init__()
        d_inner = config.n_heads * config.head_width
        n_heads_local = config.n_heads // axis.size
        self.d_head = config.head_width
        self.first_head = n_heads_local * axis.rank
        bias = config.bias_attention
        self.qkv = ColumnParallelLinear(config.d_model, 3 * d_inner, axis, init.matrix(f"{name}.qkv"), bias=bias)
        self.out = RowParallelLinear(d_inner, config.d_model, axis, init.residual(f"{name}.out"), bias=bias)
        self.dropout = Dropout(config.dropout_attention, init.seed, block_site(layer, 0), kernels)
        self.rotary = Rotary(config, kernels) if config.position == "rotary" else None
        self.alibi = Alibi(config.n_heads, self.first_head, n_heads_local) if config.position == "alibi" else None
        self.kernels = kernels["softmax"]

    def forward(self, x_BTD: Tensor, sample_ids_B: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        qkv_BTHXK = self.qkv(x_BTD).unflatten(-1, (-1, 3, self.d_head))
        if self.rotary is not None:
            qkv_BTHXK = self.rotary(qkv_BTHXK)
        q_BHTK, k_BHTK, v_BHTK = qkv_BTHXK.permute(3, 0, 2, 1, 4)
        if self.flash:
            y_BHTK = F.scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True)
        else:
            y_BHTK = self._attend_in_steps(q_BHTK, k_BHTK, v_BHTK, sample_ids_B)
        return self.out(y_BHTK.transpose(1, 2).flatten(2), epilogue)

    @property
    def flash(self) -> bool:
        """Whether torch's fused attention does it all: it has no ALiBi, and its dropout masks depend on the layout.

        Choosing a softmax kernel by name asks for the plain steps.
        """
        return self.kernels == "auto" and self.alibi is None and not self.dropout.active

    def _attend_in_steps(self, q_BHTK: Tensor, k_BHTK: Tensor, v_BHTK: Tensor, sample_ids_B: Tensor) -> Tensor:
        T = q_BHTK.shape[2]
        p_BHTT = attention_softmax(
            q_BHTK @ k_BHTK.transpose(-2, -1),
            scale=1 / math.sqrt(self.d_head),
            causal=True,
            slopes_H=self.alibi(q_BHTK.device) if self.alibi is not None else None,
            kernels=self.kernels,
        )
        return self.dropout(p_BHTT, sample_ids_B, offset=self.first_head * T * T) @ v_BHTK
