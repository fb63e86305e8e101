"""Projecting a dense matrix of the MLP onto its factorised kinds: the parameters whose product is nearest to it.

Nearest in Frobenius norm: exactly so for low_rank and monarch, whose blocks are independent; a butterfly is split in
two factors like a Monarch matrix, these again, and so on: exact for what is a butterfly, a good guess for what is not.
Everything is computed in float64.

Shapes: O outputs, I inputs, r rank; first, second, twiddle and their letters as in the files of factorised_*.py.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.inventory.factorised_sizes import Butterfly, monarch_grid
from megagpt.model.factorised import down_matrix, up_matrix
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import NamedNormal

Direction = Literal["up", "down"]


def factorise(weight: Tensor, config: ModelConfig, direction: Direction) -> dict[str, Tensor]:
    """The parameters of config's kind of matrix nearest to weight, by name, in weight's dtype.

    Shapes: weight (O, I), or (2, O, I) for the up matrix of a gated unit; parameters likewise.
    """
    if weight.ndim == 3:
        packs = [factorise(pack, config, direction) for pack in weight]
        return {name: torch.stack([pack[name] for pack in packs]) for name in packs[0]}
    if config.mlp == "low_rank":
        assert config.mlp_rank is not None
        second, first = truncated(weight.double(), config.mlp_rank)
        found = {"first": first, "second": second}
    elif config.mlp == "monarch":
        assert config.mlp_blocks is not None
        found = _monarch(weight, config.mlp_blocks)
    elif config.mlp == "butterfly":
        shape = Butterfly(config.d_model, config.ff_width)
        found = {"twiddle": _butterfly(weight if direction == "up" else weight.T, shape)}
    else:
        found = {"weight": weight}
    return {name: values.to(weight.dtype).contiguous() for name, values in found.items()}


@torch.no_grad()
def multiplied(parameters: dict[str, Tensor], config: ModelConfig, direction: Direction) -> Tensor:
    """The dense matrix (O, I), or (2, O, I), that parameters stand for: what the layer makes of the unit vectors."""
    width = config.d_model if direction == "up" else config.ff_width
    with torch.device("meta"):
        layer = (up_matrix if direction == "up" else down_matrix)(config, SINGLE, NamedNormal(0, direction))
    for name, values in parameters.items():
        layer.register_parameter(name, nn.Parameter(values))
    layer.bias = None  # pyright: ignore[reportArgumentType]
    y = layer(torch.eye(width, dtype=next(iter(parameters.values())).dtype)).T
    return y.unflatten(0, (2, -1)) if config.gated and direction == "up" else y


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (*, O, r) and right (*, r, I), whose product is the nearest of its rank; singular values go to both alike.

    From the eigenvectors of the smaller Gram matrix, several times faster than a singular value decomposition. What
    squaring loses is far below 32 bits: the product is weight, projected onto a subspace that is orthonormal anyway.
    Source: Eckart & Young 1936.
    """
    if weight.shape[-2] > weight.shape[-1]:
        left, right = truncated(weight.transpose(-2, -1), rank)
        return right.transpose(-2, -1), left.transpose(-2, -1)
    vectors = torch.linalg.eigh(weight @ weight.transpose(-2, -1)).eigenvectors[..., -rank:].flip(-1)
    right = vectors.transpose(-2, -1) @ weight
    root = right.norm(dim=-1, keepdim=True).sqrt()
    return vectors * root.transpose(-2, -1), right / root.clamp_min(torch.finfo(root.dtype).tiny)


def _monarch(weight_OI: Tensor, n_blocks: int) -> dict[str, Tensor]:
    """Each block of the grid by itself. Source: Dao et al. 2022, section 3.3, algorithm 1."""
    grid = monarch_grid(weight_OI.shape[1], weight_OI.shape[0], n_blocks)
    firsts, seconds = [], []
    for row_HI in weight_OI.view(grid.n_down, grid.height, -1):  # a row at a time: float64 takes room
        left_KHR, right_KRW = truncated(row_HI.view(grid.height, grid.n_across, -1).transpose(0, 1).double(), grid.rank)
        firsts.append(right_KRW)
        seconds.append(left_KHR.transpose(0, 1).flatten(1))
    return {"first": torch.cat(firsts, dim=1), "second": torch.stack(seconds)}


def _butterfly(weight_up: Tensor, shape: Butterfly) -> Tensor:
    """twiddle (m, c, n/2, 2, 2), from a matrix (hidden, residual).

    Rows and columns of the n that stand for no unit are taken as zero: that scales rows and columns of a butterfly,
    which leaves it one.
    """
    slots = weight_up.new_zeros(shape.high * shape.stacks * shape.kept_hidden, shape.kept_residual * shape.high)
    n_hidden, n_residual = weight_up.shape
    slots[torch.arange(n_hidden) * len(slots) // n_hidden, :n_residual] = weight_up
    slots_hcllh = slots.view(shape.high, shape.stacks, shape.kept_hidden, shape.kept_residual, shape.high)
    stacks = []
    for slots_hllh in slots_hcllh.unbind(1):
        whole = torch.zeros(shape.high, shape.low, shape.high, shape.low, dtype=torch.float64)  # index: (high, low)
        whole[:, : shape.kept_hidden, :, : shape.kept_residual] = slots_hllh.transpose(2, 3)
        levels = _levels(whole.view(shape.size, shape.size))
        stacks.append(torch.stack([level.flatten(-4, -3) for level in levels]))
    return torch.stack(stacks, dim=1)


def _levels(whole: Tensor) -> list[Tensor]:
    """Of butterflies (*, n, n): 2x2 matrices level by level, (*, u, v, 2, 2), u counting the bits above, v below.

    Source: Le, Zheng, Riccietti & Gribonval 2022, "Fast learning of fast transforms, with guarantees", section 3.
    """
    n = whole.shape[-1]
    if n == 2:
        return [whole[..., None, None, :, :]]
    high = 1 << n.bit_length() // 2  # half of the bits, rounded up: as Butterfly.high, though any split would do
    blocks = whole.unflatten(-1, (high, -1)).unflatten(-3, (high, -1))  # out: high, low; in: high, low
    left, right = truncated(blocks.movedim(-1, -3), 1)  # by (high out, low in), each of (low out, high in)
    of_high = right.squeeze(-2).transpose(-3, -2)  # by low in: (high out, high in)
    of_low = left.squeeze(-1).transpose(-2, -1)  # by high out: (low out, low in)
    upper = [level.movedim(-5, -3).flatten(-4, -3) for level in _levels(of_high)]
    return upper + [level.flatten(-5, -4) for level in _levels(of_low)]
