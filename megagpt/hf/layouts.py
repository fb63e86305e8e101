"""How the rows of query, key and value are laid out, in their files and in ours: each one of three, and exact inverses.

Shapes: H heads, G key/value heads, K head width; * further dims (the inputs of a weight, none of a bias).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megagpt.config import ModelConfig

Parts = tuple[Tensor, Tensor, Tensor]
"""q (H, K, *), k (G, K, *), v (G, K, *)."""


@dataclass(frozen=True)
class QKV:
    """One layout. n_tensors: of how many tensors. take and give: its tensors → parts, and back."""

    n_tensors: int
    take: Callable[[Sequence[Tensor], ModelConfig], Parts]
    give: Callable[[Parts], tuple[Tensor, ...]]


def ours_of(parts: Parts) -> tuple[Tensor, ...]:
    """(qkv,) head by head where each head has its own key; else (q, kv), kv by key/value head [k, v]."""
    q_HK, k_GK, v_GK = parts
    if len(q_HK) == len(k_GK):
        return (torch.stack((q_HK, k_GK, v_GK), dim=1).flatten(0, 2),)
    return q_HK.flatten(0, 1).contiguous(), torch.stack((k_GK, v_GK), dim=1).flatten(0, 2)


def parts_of_ours(ours: Sequence[Tensor], config: ModelConfig) -> Parts:
    """The inverse of ours_of."""
    heads = (config.kv_heads, -1, config.head_width)
    if len(ours) == 1:
        q_HK, k_HK, v_HK = ours[0].unflatten(0, heads).unbind(1)
        return q_HK, k_HK, v_HK
    k_GK, v_GK = ours[1].unflatten(0, heads).unbind(1)
    return ours[0].unflatten(0, (-1, config.head_width)), k_GK, v_GK


def _take_kinds(theirs: Sequence[Tensor], config: ModelConfig) -> Parts:
    heads = theirs[0].unflatten(0, (-1, config.head_width))
    q_HK, k_GK, v_GK = heads.split((config.n_heads, config.kv_heads, config.kv_heads))
    return q_HK, k_GK, v_GK


def _give_kinds(parts: Parts) -> tuple[Tensor, ...]:
    return (torch.cat(parts).flatten(0, 1),)


def _take_groups(theirs: Sequence[Tensor], config: ModelConfig) -> Parts:
    groups = theirs[0].unflatten(0, (config.kv_heads, -1, config.head_width))
    return groups[:, :-2].flatten(0, 1), groups[:, -2], groups[:, -1]


def _give_groups(parts: Parts) -> tuple[Tensor, ...]:
    q_HK, k_GK, v_GK = parts
    q_GXK = q_HK.unflatten(0, (len(k_GK), -1))
    return (torch.cat((q_GXK, k_GK[:, None], v_GK[:, None]), dim=1).flatten(0, 2),)


def _take_separate(theirs: Sequence[Tensor], config: ModelConfig) -> Parts:
    q_HK, k_GK, v_GK = (tensor.unflatten(0, (-1, config.head_width)) for tensor in theirs)
    return q_HK, k_GK, v_GK


def _give_separate(parts: Parts) -> tuple[Tensor, ...]:
    return tuple(part.flatten(0, 1).contiguous() for part in parts)


BY_KIND = QKV(1, _take_kinds, _give_kinds)
"""[q of all heads | k | v]."""

BY_GROUP = QKV(1, _take_groups, _give_groups)
"""By key/value head [its q …, k, v]."""

SEPARATE = QKV(3, _take_separate, _give_separate)
"""A tensor each."""
