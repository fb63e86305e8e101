"""Causal self-attention, heads shared out over the model axis; which implementation computes it.

Shapes: B batch, T time, D model, H this rank's heads, G its heads of keys and values, K head width, X what is packed
side by side: [q, k, v], [q] or [k, v].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from megagpt.config import ModelConfig
from megagpt.config.kernels import AUTO, Kernels, attention_lacks, attention_runs
from megagpt.model.dropout import Dropout, block_site
from megagpt.model.init import Init
from megagpt.model.masks import Masks
from megagpt.model.position import Alibi, Rotary
from megagpt.model.relative import T5Buckets, TransformerXL, grouped_scores
from megagpt.ops.library import Status
from megagpt.ops.softmax import attention_softmax
from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import copy_to
from megagpt.parallel.kv_linear import HeadsLinear
from megagpt.parallel.linear import ColumnParallelLinear, Epilogue, RowParallelLinear


class Attention(nn.Module):
    """softmax(q kᵀ / √K + position bias, masked) v per head, then a projection back to the residual stream.

    Where each query head has keys of its own, qkv.weight holds them head by head, [q, k, v] within a head; else
    q.weight holds the queries, kv.weight the others, [k, v] within a head: so a range of rows is one rank's heads.
    Shapes: x_BTD → y_BTD.  Comm: those of a column- and a row-parallel layer, none where it is to be `partial`; and see
    `HeadsLinear`.
    Source: Vaswani et al. 2017; Shoeybi et al. 2019, section 3; Ainslie et al. 2023 (grouped queries).
    Raises ValueError for a kernel that lacks what the configuration asks for.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        axis: Axis,
        init: Init,
        name: str,
        kernels: Kernels = AUTO,
        *,
        partial: bool = False,
    ) -> None:
        super().__init__()
        self.choice, self.softmax_kernels = kernels["attention"], kernels["softmax"]
        lacks = attention_lacks(self.choice, config.position, config.dropout_attention)
        if lacks is not None:
            raise ValueError(f"attention={self.choice} has no {lacks}; use attention=auto")
        d_model, K, bias = config.d_model, config.head_width, config.bias_attention
        d_inner, n_heads_local = config.n_heads * K, config.n_heads // axis.size
        self.axis, self.d_head, self.first_head, self.partial = axis, K, n_heads_local * axis.rank, partial
        self.qkv = self.q = self.kv = None
        if config.grouped:
            self.q = HeadsLinear(d_model, config.n_heads, K, axis, init.matrix(f"{name}.q"), bias=bias)
            self.kv = HeadsLinear(d_model, config.kv_heads, 2 * K, axis, init.matrix(f"{name}.kv"), bias=bias)
        else:
            self.qkv = ColumnParallelLinear(
                d_model, 3 * d_inner, axis, init.matrix(f"{name}.qkv"), bias=bias, copied=partial
            )
        self.out = RowParallelLinear(d_inner, d_model, axis, init.residual(f"{name}.out"), bias=bias, partial=partial)
        self.dropout = Dropout(config.dropout_attention, init.seed, block_site(layer, 0), kernels)
        self.masks = Masks(config.pattern(layer), layer, config.seq_len)
        self.position = config.position
        self.rotary = Rotary(config, kernels) if self.position == "rotary" else None
        self.alibi = Alibi(config.n_heads, self.first_head, n_heads_local) if self.position == "alibi" else None
        relative = self.position == "transformer_xl"
        self.relative = TransformerXL(config, axis, init, f"{name}.relative") if relative else None
        self.buckets = T5Buckets(config, axis, init, f"{name}.buckets") if self.position == "t5" else None

    def forward(self, x_BTD: Tensor, sample_ids_B: Tensor, epilogue: Epilogue | None = None) -> Tensor:
        q_BHTK, k_BGTK, v_BGTK = self._project(x_BTD)
        runs = attention_runs(self.choice, self.position, self.dropout.active)
        if runs == "sdpa":
            y_BHTK = self._sdpa(q_BHTK, k_BGTK, v_BGTK)
        elif runs == "flex":
            y_BHTK = self._flex(q_BHTK, k_BGTK, v_BGTK)
        else:
            y_BHTK = self._steps(q_BHTK, k_BGTK, v_BGTK, sample_ids_B)
        return self.out(y_BHTK.transpose(1, 2).flatten(2), epilogue)

    def _project(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.qkv is not None:
            qkv_BTHXK = self._turn(self.qkv(x_BTD).unflatten(-1, (-1, 3, self.d_head)))
            q_BHTK, k_BHTK, v_BHTK = qkv_BTHXK.permute(3, 0, 2, 1, 4)
            return q_BHTK, k_BHTK, v_BHTK
        assert self.q is not None and self.kv is not None
        x_BTD = x_BTD if self.partial else copy_to(x_BTD, self.axis)
        q_BTHXK = self._turn(self.q(x_BTD).unflatten(-1, (-1, 1, self.d_head)), 1)
        kv_BTGXK = self._turn(self.kv(x_BTD).unflatten(-1, (-1, 2, self.d_head)))
        k_BGTK, v_BGTK = kv_BTGXK.permute(3, 0, 2, 1, 4)
        return q_BTHXK.squeeze(3).transpose(1, 2), k_BGTK, v_BGTK

    def _turn(self, x_BTGXK: Tensor, n_rotated: int | None = None) -> Tensor:
        return x_BTGXK if self.rotary is None else self.rotary(x_BTGXK, n_rotated)

    def _sdpa(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        n_heads, n_kv_heads, T, device = q_BHTK.shape[1], k_BGTK.shape[1], q_BHTK.shape[2], q_BHTK.device
        dense = self.masks.pattern.kind == "dense"
        mask = None if dense else self.masks.dense(T, device)
        grouped = n_heads != n_kv_heads
        # On CUDA only the flash kernel knows groups; it takes no mask, and 16 bits alone. Elsewhere torch would say
        # nothing and hold all scores.
        if grouped and not (dense and (device.type == "cpu" or q_BHTK.dtype in (torch.float16, torch.bfloat16))):
            k_BGTK, v_BGTK = (x.repeat_interleave(n_heads // n_kv_heads, dim=1) for x in (k_BGTK, v_BGTK))
            grouped = False
        return F.scaled_dot_product_attention(
            q_BHTK, k_BGTK, v_BGTK, attn_mask=mask, is_causal=dense, enable_gqa=grouped
        )

    def _flex(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor) -> Tensor:
        device = q_BHTK.device
        slopes_H = None if self.alibi is None else self.alibi(device)

        def alibi(score: Tensor, b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            assert slopes_H is not None
            return score + slopes_H[head] * (key - query)

        # Uncompiled, it holds all scores: what a CPU is given, where only its results count.
        run = torch.compile(flex_attention) if device.type == "cuda" else flex_attention
        blocks = self.masks.blocks(q_BHTK.shape[2], device)
        score_mod, grouped = None if slopes_H is None else alibi, q_BHTK.shape[1] != k_BGTK.shape[1]
        return run(q_BHTK, k_BGTK, v_BGTK, score_mod=score_mod, block_mask=blocks, enable_gqa=grouped)  # type: ignore[return-value]

    def _steps(self, q_BHTK: Tensor, k_BGTK: Tensor, v_BGTK: Tensor, sample_ids_B: Tensor) -> Tensor:
        T, device = q_BHTK.shape[2], q_BHTK.device
        scores_BHTT, scale = self._scores(q_BHTK, k_BGTK)
        p_BHTT = attention_softmax(
            scores_BHTT,
            scale=scale,
            causal=True,
            window=self.masks.window,
            mask=self.masks.dense(T, device) if self.masks.needed else None,
            slopes_H=None if self.alibi is None else self.alibi(device),
            kernels=self.softmax_kernels,
        )
        p_BHTT = self.dropout(p_BHTT, sample_ids_B, offset=self.first_head * T * T)
        p_BGXT = p_BHTT.unflatten(1, (v_BGTK.shape[1], -1)).flatten(2, 3)
        return (p_BGXT @ v_BGTK).unflatten(2, (-1, T)).flatten(1, 2)

    def _scores(self, q_BHTK: Tensor, k_BGTK: Tensor) -> tuple[Tensor, float]:
        """Scores, and what they still must be multiplied by."""
        scale = 1 / math.sqrt(self.d_head)
        if self.relative is not None:
            return self.relative(q_BHTK, k_BGTK), scale
        scores_BHTT = grouped_scores(q_BHTK, k_BGTK)
        if self.buckets is not None:  # scaled here, in the one rounding of the sum
            return torch.add(self.buckets(q_BHTK.shape[2]), scores_BHTT, alpha=scale), 1.0
        return scores_BHTT, scale


def attention_ops(config: ModelConfig, kernels: Kernels) -> list[str]:
    """The ops of megagpt/ops that attention calls in training."""
    dropping = config.dropout_attention > 0
    steps = attention_runs(kernels["attention"], config.position, dropping) in ("softmax", "reference")
    uses = {"softmax": steps, "dropout": dropping, "rotary": config.position == "rotary"}
    return [op for op, used in uses.items() if used]


def attention_status(config: ModelConfig, kernels: Kernels) -> Status:
    """Which attention runs in training, and why: for the start-up table."""
    choice, dropout = kernels["attention"], config.dropout_attention
    runs = attention_runs(choice, config.position, dropout > 0)
    text = {"sdpa": "torch's scaled_dot_product_attention", "flex": "torch's FlexAttention"}.get(
        runs, "softmax's steps"
    )
    lacks = attention_lacks("sdpa", config.position, dropout)
    why = f"torch's has no {lacks}" if lacks else "has all that is needed"
    return Status("attention", text, why if choice == "auto" else "asked for")
