"""Positions as what a score gains by the distance of its key: Transformer-XL's and T5's, which learn it.

Shapes: B batch, T time, H this rank's heads, G its heads of keys, K head width, D model.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.model.init import Init
from megagpt.model.position import Sinusoids
from megagpt.parallel.axis import Axis
from megagpt.parallel.parameter import sharded


class TransformerXL(nn.Module):
    """Scores (q_i + u) · k_j + (q_i + v) · W r_{i-j}, with a sinusoid r of the distance and learned u, v and W.

    Shapes: (q_BHTK, k_BGTK) → scores_BHTT, right where the key is not ahead of the query (else any finite numbers).
    weight W (H * K, D), content_bias u (H, K), position_bias v (H, K).
    Comm: none: r is the same on all ranks and has no gradient.
    Source: Dai et al. 2019, section 3.3 and appendix B (the shift).
    """

    def __init__(self, config: ModelConfig, axis: Axis, init: Init, name: str) -> None:
        super().__init__()
        draw, per_head = init.matrix(name), (config.n_heads, config.head_width)
        self.sinusoids = Sinusoids(config.seq_len, config.d_model)
        self.weight = sharded(draw("weight", (math.prod(per_head), config.d_model)), 0, axis)
        self.content_bias = sharded(draw("content_bias", per_head), 0, axis)
        self.position_bias = sharded(draw("position_bias", per_head), 0, axis)

    def forward(self, q_BHTK: Tensor, k_BGTK: Tensor) -> Tensor:
        r_TD = self.sinusoids(q_BHTK.transpose(1, 2)).flip(0)  # of the distances T - 1 … 0
        r_HTK = F.linear(r_TD, self.weight).unflatten(-1, self.content_bias.shape).transpose(0, 1)
        by_distance_BHTT = (q_BHTK + self.position_bias.unsqueeze(1)) @ r_HTK.transpose(-2, -1)
        return grouped_scores(q_BHTK + self.content_bias.unsqueeze(1), k_BGTK) + shift(by_distance_BHTT)


class T5Buckets(nn.Module):
    """What a head adds to its scores: a learned number a bucket of distances, the far ones in ever larger buckets.

    Shapes: T → bias_HTT, right where the key is not ahead of the query (else any of the numbers).
    weight (t5_buckets, H).  Comm: none.  Source: Raffel et al. 2020, section 2.1.
    """

    def __init__(self, config: ModelConfig, axis: Axis, init: Init, name: str) -> None:
        super().__init__()
        self.n_buckets, self.max_distance = config.t5_buckets, config.t5_max_distance
        self.weight = sharded(init.matrix(name)("weight", (self.n_buckets, config.n_heads)), 1, axis)

    def forward(self, T: int) -> Tensor:
        distance_T = torch.arange(T - 1, -1, -1, device=self.weight.device)
        bias_HT = self.weight[bucket(distance_T, self.n_buckets, self.max_distance)].t()
        return shift(bias_HT.unsqueeze(1).expand(-1, T, -1))


def bucket(distance: Tensor, n_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each distance: half of them hold one each, the others grow as its logarithm up to max_distance.

    Shapes: distance int64, any shape → the same.
    """
    n_exact = n_buckets // 2
    # In float32 as published: on the edge of a bucket the rounding decides, and trained tables rely on it.
    share = torch.log(distance.clamp(min=n_exact).float() / n_exact) / math.log(max_distance / n_exact)
    far = n_exact + (share * (n_buckets - n_exact)).long()
    return torch.where(distance < n_exact, distance, far.clamp(max=n_buckets - 1))


def shift(x_TT: Tensor) -> Tensor:
    """From columns that are distances, T - 1 … 0, to columns that are keys; what is ahead of a query is arbitrary.

    Row i must move left by T - 1 - i. With a column more, the rows of the flat array are one longer than those that it
    is cut into again, and each begins one element later than the last one.
    Shapes: (…, T, T) → (…, T, T).  Source: Dai et al. 2019, appendix B.
    """
    T = x_TT.shape[-1]
    return F.pad(x_TT, (1, 0)).flatten(-2)[..., T:].unflatten(-1, (T, T))


def grouped_scores(q_BHTK: Tensor, k_BGTK: Tensor) -> Tensor:
    """q · k, each key head for H / G neighbouring query heads.  Shapes: → scores_BHTT."""
    T = q_BHTK.shape[2]
    q_BGXK = q_BHTK.unflatten(1, (k_BGTK.shape[1], -1)).flatten(2, 3)  # one matrix for all queries of a key head
    return (q_BGXK @ k_BGTK.transpose(-2, -1)).unflatten(2, (-1, T)).flatten(1, 2)
