"""How the rows of query, key and value are laid out: in their files one of three ways, in ours as declared.

Shapes: H heads, G key/value heads, K head width; * further dims (the inputs of a weight, none of a bias).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megagpt.inventory.parameter import Parameter

if TYPE_CHECKING:
    from megagpt.config import ModelConfig

Parts = tuple[Tensor, Tensor, Tensor]
"""q (H, K, *), k (G, K, *), v (G, K, *)."""


@dataclass(frozen=True)
class QKV:
    """A layout of theirs. take and give: its tensors → parts, and back; exact inverses."""

    take: Callable[[Sequence[Tensor], ModelConfig], Parts]
    give: Callable[[Parts], tuple[Tensor, ...]]


def ours_of(parts: Parts, declared: Sequence[Parameter]) -> tuple[Tensor, ...]:
    """Our tensors: each takes as many of q, k, v as its layer declares maps a head, and has them side by side in it."""
    rest = iter(parts)
    return tuple(torch.stack([next(rest) for _ in range(p.maps_per_head)], dim=1).flatten(0, 2) for p in declared)


def parts_of_ours(ours: Sequence[Tensor], declared: Sequence[Parameter]) -> Parts:
    """The inverse of ours_of."""
    by_head = [t.unflatten(0, (p.heads or 1, p.maps_per_head, -1)) for t, p in zip(ours, declared, strict=True)]
    q_HK, k_GK, v_GK = (part for heads in by_head for part in heads.unbind(1))
    return q_HK, k_GK, v_GK


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


BY_KIND = QKV(_take_kinds, _give_kinds)
"""[q of all heads | k | v]."""

BY_GROUP = QKV(_take_groups, _give_groups)
"""By key/value head [its q …, k, v]."""

SEPARATE = QKV(_take_separate, _give_separate)
"""A tensor each."""
