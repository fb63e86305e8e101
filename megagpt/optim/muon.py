"""Muon: the momentum of a matrix, made orthogonal, is its step. Ranks that share a matrix gather it, and one computes.

What counts as one matrix is one linear map: query, key and value each, all heads together; a gate and what it gates
each. A factorised weight's leading dims number matrices.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megagpt.optim.adam import AdamW
from megagpt.optim.update import EXP_AVG, Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megagpt.config import RunConfig
    from megagpt.inventory.parameter import Parameter
    from megagpt.optim.mesh_optimizer import MeshOptimizer
    from megagpt.optim.segments import Segment, Segments

STEPS = 5
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan's: the steepest at 0 that ends between about 0.7 and 1.2
RMS_OF_ADAM = 0.2  # Moonshot's measurement of how far AdamW moves a weight, in learning rates


class Muon(Update):
    """For the linear maps of blocks, large enough to have a rank; AdamW steps the others."""

    name = "muon"
    moments = (EXP_AVG,)

    def of(self, parameter: Parameter) -> Update:
        return self if parameter.kind == "map" and min(parameter.shape[-2:]) > 2 else OTHERS

    def settings(self, run: RunConfig) -> dict[str, Any]:
        # Rounding to 16 bits would let layouts differ by more than round-off, where nothing else rounds to them.
        return {"precision": "float32" if run.train.precision == "fp32" else "bfloat16"}

    def step(self, optimizer: MeshOptimizer, masters: list[Tensor], group: dict[str, Any]) -> None:
        muon(optimizer.segments, optimizer.segments_of(masters), optimizer.state, group)


OTHERS = AdamW()


def muon(segments: Segments, parts: list[Segment], state: Any, group: dict[str, Any]) -> None:
    """One step of the matrices that `parts` are segments of. Overwrites their gradients.

    Nesterov momentum; the step's root mean square is that of AdamW's, so that its rate and decay serve.
    The matrices are shared out over the ranks of the data and model axes: the iteration costs more than the transfer.
    group: has the "precision" of the iteration.
    Comm: that of `Segments.gather` and `Segments.scatter`, for each matrix.
    Source: Jordan et al. 2024 (Muon); Liu et al. 2025, section 2.2 (scale).
    """
    for part in parts:
        gradient, momentum = part.of(part.gradients), part.of(state[part.master][EXP_AVG])
        momentum.lerp_(gradient, 1 - group["betas"][0])
        gradient.lerp_(momentum, group["betas"][0])
    data, model = segments.mesh.data, segments.mesh.model
    for number, part in enumerate(parts):
        owner = (number % data.size, number // data.size % model.size)
        full = segments.gather(part, part.gradients, owner)
        if owner == (data.rank, model.rank):
            full = _orthogonal_weight(full, part.named.declared, group["precision"])
        weight = part.of(part.master)
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.sub_(segments.scatter(part, full, owner).to(weight.device), alpha=group["lr"])


def _orthogonal_weight(full: Tensor, declared: Parameter, precision: str) -> Tensor:
    """The step of a logical weight: each of the linear maps in it made orthogonal by itself."""
    import torch  # computes: what is declared is read without it

    n_heads = declared.heads or 1
    maps = orthogonal(maps_of(full, n_heads, declared.maps_per_head), getattr(torch, precision))
    return weight_of(maps, n_heads, declared.shape).contiguous()


def orthogonal(matrices_NRC: Tensor, precision: torch.dtype) -> Tensor:
    """Each matrix with its singular values near 1, scaled to the root mean square that AdamW's steps have.

    Shapes: N matrices of R rows and C columns, and the same.
    Source: Jordan et al. 2024: five steps of a quintic Newton-Schulz iteration; Liu et al. 2025, equation 4.
    """
    import torch  # likewise

    n_rows, n_columns = matrices_NRC.shape[-2:]
    x = matrices_NRC.to(precision)
    x = x.mT if n_rows > n_columns else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_(min=1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if n_rows > n_columns else x
    return x.to(matrices_NRC.dtype) * (RMS_OF_ADAM * math.sqrt(max(n_rows, n_columns)))


def maps_of(full: Tensor, n_heads: int, maps_per_head: int) -> Tensor:
    """A logical weight as a batch of linear maps (N, R, C); rows that go head by head are sorted by map."""
    if full.dim() == 2:
        of_heads = full.view(n_heads, maps_per_head, -1, full.shape[-1])
        return of_heads.transpose(0, 1).reshape(maps_per_head, -1, full.shape[-1])
    return full.reshape(-1, *full.shape[-2:])


def weight_of(maps_NRC: Tensor, n_heads: int, shape: tuple[int, ...]) -> Tensor:
    """The logical weight again: the inverse of `maps_of`."""
    if len(shape) == 2:
        n_maps, _, n_columns = maps_NRC.shape
        return maps_NRC.reshape(n_maps, n_heads, -1, n_columns).transpose(0, 1).reshape(shape)
    return maps_NRC.reshape(shape)
