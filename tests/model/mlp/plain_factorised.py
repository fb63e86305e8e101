"""Factorised matrices written out as dense ones, entry by entry from the papers' definitions; differentiable.

Shapes: I inputs, O outputs; first and second as in megagpt/model/mlp/monarch.py; one matrix, no packs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def monarch_dense(first: Tensor, second: Tensor) -> Tensor:
    """block_diag(second) · permutation · block_diag(first): Dao et al. 2022, section 3.1, less the last permutation."""
    order = (
        torch.arange(first[..., 0].numel()).view(len(first), len(second), -1).transpose(0, 1)
    )  # (K, J, R) → (J, K, R)
    return torch.block_diag(*second) @ torch.block_diag(*first)[order.flatten()]


def butterfly_dense(twiddle: Tensor, n_residual: int, n_hidden: int) -> Tensor:
    """The up matrix (hidden, residual) of stacked butterflies; down is the transpose of such a one.

    twiddle (m, c, n/2, 2, 2): Dao et al. 2019, section 3; the levels from the largest stride to the smallest.
    """
    m, c = twiddle.shape[:2]
    high, low = 2 ** math.ceil(m / 2), 2 ** (m // 2)
    wholes = [level_product(twiddle[:, j]) for j in range(c)]
    position = [(d % high) * low + d // high for d in range(n_residual)]  # residual units go by groups of `high`
    used_low = math.ceil(n_hidden / (c * high))
    slots = high * c * used_low
    rows = []
    for unit in range(n_hidden):
        slot = unit * slots // n_hidden
        hi, rest = divmod(slot, c * used_low)
        j, lo = divmod(rest, used_low)
        rows.append(wholes[j][hi * low + lo, position])
    return torch.stack(rows)


def level_product(twiddle: Tensor) -> Tensor:
    """One butterfly (n, n) from its 2x2 matrices (m, n/2, 2, 2), each level a sparse n x n matrix."""
    m, half = twiddle.shape[:2]
    n = 2 * half
    whole = torch.eye(n, dtype=twiddle.dtype)
    for s in range(m):
        stride = n >> (s + 1)
        level = torch.zeros(n, n, dtype=twiddle.dtype)
        for pair in range(half):
            block, offset = divmod(pair, stride)
            top = block * 2 * stride + offset
            for a in range(2):
                for b in range(2):
                    place = (torch.tensor(top + a * stride), torch.tensor(top + b * stride))
                    level = level.index_put(place, twiddle[s, pair, a, b])
        whole = level @ whole
    return whole
