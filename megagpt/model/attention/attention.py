"""Causal self-attention, heads shared out over the model axis.

Shapes: B batch, T time, D model, H this rank's heads, G its heads of keys and values, K head width, S keys, X what is
packed side by side: [q, k, v], [q] or [k, v].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config.kernels import AUTO, Kernels
from megagpt.inventory.attention import attention_lacks, attention_runs
from megagpt.model.attention import IMPLEMENTATIONS
from megagpt.model.attention.masks import Masks
from megagpt.model.dropout import Dropout, block_site
from megagpt.model.position import POSITIONS
from megagpt.model.stream import Stream
from megagpt.parallel.axis import Axis
from megagpt.parallel.linear import SUMMED, ColumnParallelLinear, Edges, Epilogue, HeadsLinear, RowParallelLinear
from megagpt.parallel.parameter import Declared

if TYPE_CHECKING:
    from megagpt.config import ModelConfig
    from megagpt.model.cache import View


class Attention(nn.Module):
    """softmax(q kᵀ / √K + position bias, masked) v per head, then a projection back to the residual stream.

    Where each query head has keys of its own, qkv.weight holds them head by head, [q, k, v] within a head; else
    q.weight holds the queries, kv.weight the others, [k, v] within a head: so a range of rows is one rank's heads.
    Shapes: stream of x_BTD → y_BTD.  Comm: `edges.enter` of x and `edges.leave` of y; and see `HeadsLinear`.
    Source: Vaswani et al. 2017; Shoeybi et al. 2019, section 3; Ainslie et al. 2023 (grouped queries).
    Raises ValueError for a kernel that lacks what the configuration asks for.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        axis: Axis,
        declared: Declared,
        kernels: Kernels = AUTO,
        edges: Edges = SUMMED,
    ) -> None:
        super().__init__()
        self.choice, self.softmax_kernels, self.rotary_kernels = (
            kernels[op] for op in ("attention", "softmax", "rotary")
        )
        lacks = attention_lacks(self.choice, config.position, config.dropout_attention)
        if lacks is not None:
            raise ValueError(f"attention={self.choice} has no {lacks}; use attention=auto")
        n_heads_local = config.n_heads // axis.size
        self.config, self.axis, self.layer, self.d_head, self.edges = config, axis, layer, config.head_width, edges
        self.heads = range(n_heads_local * axis.rank, n_heads_local * (axis.rank + 1))
        self.qkv = self.q = self.kv = None
        self.grouped = config.grouped
        if config.grouped:
            self.q, self.kv = HeadsLinear(declared.at("q"), axis), HeadsLinear(declared.at("kv"), axis)
        else:
            self.qkv = ColumnParallelLinear(declared.at("qkv"), axis, edges)
        self.out = RowParallelLinear(declared.at("out"), axis, edges)
        self.dropout = Dropout(config.dropout_attention, declared.seed, block_site(layer, 0), kernels)
        self.masks = Masks(config.pattern(layer), layer, config.seq_len)
        self.position = POSITIONS[config.position](config, layer)
        if self.position.part:
            self.add_module(self.position.part, LearnedPosition(declared.at(self.position.part), axis))

    def forward(self, stream: Stream, epilogue: Epilogue | None = None) -> Tensor:
        q_BHTK, kv_BTGXK = self._project(stream)
        if stream.cache is None:
            k_BGTK, v_BGTK = kv_BTGXK.permute(3, 0, 2, 1, 4)
            runs = attention_runs(self.choice, self.config, self.layer, self.dropout.active, q_BHTK.shape[2])
            y_BHTK = IMPLEMENTATIONS[runs].attend(self, q_BHTK, k_BGTK, v_BGTK, stream.sample_ids_B, stream.documents)
        else:
            y_BHTK = self._attend_cached(q_BHTK, kv_BTGXK, stream.cache)
        y_BTD = y_BHTK.transpose(1, 2).flatten(2)
        y_BTD = y_BTD if stream.cache is None else stream.cache.packed(y_BTD)
        return self.out(y_BTD, epilogue, stream.sample_ids_B)

    def learned(self, compute: Callable[..., Tensor], *arguments: object) -> Tensor:
        """What a method of the position, which takes its parameters by name first, makes of these."""
        part = self.position.part
        return self.get_submodule(part)(compute, *arguments) if part else compute({}, *arguments)

    def _project(self, stream: Stream) -> tuple[Tensor, Tensor]:
        """Shapes: → q_BHTK, kv_BTGXK."""
        x_BTD, ids_B = stream.x, stream.sample_ids_B
        if self.qkv is not None:
            qkv_BTHXK = self._turn(self.qkv(x_BTD, sample_ids_B=ids_B), stream, 3)
            return qkv_BTHXK[:, :, :, 0].transpose(1, 2), qkv_BTHXK[:, :, :, 1:]
        assert self.q is not None and self.kv is not None
        x_BTD = self.edges.enter(x_BTD, self.axis)
        q_BTHXK, kv_BTGXK = self._turn(self.q(x_BTD, ids_B), stream, 1, 1), self._turn(self.kv(x_BTD, ids_B), stream, 2)
        return q_BTHXK.squeeze(3).transpose(1, 2), kv_BTGXK

    def _turn(self, x_BTC: Tensor, stream: Stream, n_packed: int, n_turned: int | None = None) -> Tensor:
        """By head, and by position.  Shapes: C heads x n_packed x K → x_BTGXK."""
        view = stream.cache
        positions_BT = stream.positions_BT if view is None else view.positions_BT
        x_BTC = x_BTC if view is None else view.by_row(x_BTC)
        x_BTGXK = x_BTC.unflatten(-1, (-1, n_packed, self.d_head))
        return self.position.turn(x_BTGXK, positions_BT, n_turned, self.rotary_kernels)

    def _attend_cached(self, q_BHTK: Tensor, kv_BTGXK: Tensor, view: View) -> Tensor:
        """Of queries where the view says, to their own keys and those in the cache."""
        if self.dropout.active:
            raise ValueError("attention dropout knows tokens by their place in the sample; got a cache")
        k_BGSK, v_BGSK = view.extend(self.layer, kv_BTGXK)
        sees_all = self.position.adds is None and view.sees_all and not self.masks.rule.needs_mask
        mask = None if sees_all else self._mask(view, q_BHTK, k_BGSK)
        G, T = k_BGSK.shape[1], q_BHTK.shape[2]
        if T > 1 or not self.grouped:
            return F.scaled_dot_product_attention(q_BHTK, k_BGSK, v_BGSK, attn_mask=mask, enable_gqa=self.grouped)
        # The queries of one key head side by side, as if they were of several tokens: the keys are read once.
        if mask is not None and mask.shape[1] > 1:
            mask = mask.view(-1, G, q_BHTK.shape[1] // G, mask.shape[-1])
        y_BGXK = F.scaled_dot_product_attention(q_BHTK.reshape(len(q_BHTK), G, -1, self.d_head), k_BGSK, v_BGSK, mask)
        return y_BGXK.view_as(q_BHTK)

    def _mask(self, view: View, q_BHTK: Tensor, k_BGSK: Tensor) -> Tensor:
        """What is added to the scores: -inf where a key is not seen.  Shapes: → (B, H or 1, T, S).

        Layers of one pattern share it in a pass where positions add nothing that a layer learns.
        """
        shared, kept, queries_BT = self.position.adds in (None, "slopes"), view.kept, view.positions_BT
        key = self.masks.pattern, self.layer if self.masks.rule.differs else None, k_BGSK.shape[2]
        if not shared or key not in kept:
            keys_BS = view.key_positions(self.layer)
            distance_BTS = queries_BT.unsqueeze(-1) - keys_BS.unsqueeze(-2)
            added_BHTS = self.learned(self.position.added, q_BHTK, k_BGSK, distance_BTS, self.heads)
            allowed_BTS = self.masks.between(queries_BT, keys_BS)
            mask_BHTS = added_BHTS.masked_fill(~allowed_BTS.unsqueeze(1), -math.inf)
            if not shared:
                return mask_BHTS
            kept[key] = mask_BHTS
        return kept[key]


class LearnedPosition(nn.Module):
    """The parameters of a kind of position within attention. ZeRO-3 gathers them for what runs inside of forward."""

    def __init__(self, declared: Declared, axis: Axis) -> None:
        super().__init__()
        for name in declared.parameters:
            self.register_parameter(name, declared.make(name, axis))

    def forward(self, compute: Callable[..., Tensor], *arguments: object) -> Tensor:
        return compute(dict(self.named_parameters()), *arguments)
