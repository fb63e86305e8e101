"""The two matrices of an MLP: what a kind of them declares and computes. Dense matrices are the plain case.

A kind is one file beside this one (its settings' checks, parameters, arithmetic, and the projection of a dense matrix
onto it) and a line of MLPS. Torch is imported where it computes, so that a plan reads what it declares without it.

Letters: D residual stream, F hidden width, I inputs, O outputs, _local a shard over the axis, packs the 2 matrices of a
gated unit, else absent.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from megagpt.errors import divisors, require
from megagpt.inventory.init import matrix_std, residual_std
from megagpt.inventory.parameter import ZEROS, Kept, Parameter, Parameters, column, row

if TYPE_CHECKING:
    from torch import Tensor

    from megagpt.config import ModelConfig
    from megagpt.parallel.axis import Axis
    from megagpt.parallel.linear import Edges

Direction = Literal["up", "down"]
Weights = Mapping[str, "Tensor"]


class Dense:
    """W itself.

    settings: those of ModelConfig that this kind alone has.  is_product: whether W is a product of parameters.
    packs: 2 for a gated unit, whose up matrices stand side by side, else 1.  packed: the dim that this puts in front.
    """

    settings: ClassVar[tuple[str, ...]] = ()
    is_product: ClassVar[bool] = False

    def __init__(self, model: ModelConfig) -> None:
        self.model, self.packs = model, 2 if model.gated else 1
        self.packed: tuple[int, ...] = (2,) if model.gated else ()

    def check(self) -> None:
        """Raises UserError for settings that do not fit together."""

    def check_tp(self, tp: int) -> None:
        """Raises UserError where so many ranks cannot share it."""
        width = self.model.ff_width
        choices = ", ".join(map(str, divisors(width)))
        wanted, keys = f"must divide d_ff={width}", ("parallel.tp", "model.d_ff")
        require(width % tp == 0, f"parallel.tp={tp}", wanted, f"try {choices}", *keys)

    def up(self) -> Parameters:
        """Of the matrix from the residual stream to the hidden width (packs of them), and its bias."""
        D, F, std = self.model.d_model, self.model.ff_width, matrix_std(self.model, self.model.d_model)
        return column(D, F, std, bias=self.model.bias_mlp, packs=self.packs)

    def down(self) -> Parameters:
        """Of the matrix back to the residual stream, and its bias."""
        D, F = self.model.d_model, self.model.ff_width
        return row(F, D, residual_std(self.model, F), bias=self.model.bias_mlp)

    def kept(self) -> tuple[Kept, ...]:
        """What the backward pass keeps beside input, hidden width and output."""
        return ()

    def project(self, weight: Tensor, direction: Direction) -> dict[str, Tensor]:
        """The parameters whose product is nearest to a dense matrix (O, I), by name; float64 inside."""
        return {"weight": weight}


class Product(Dense, ABC):
    """W as a product of fewer parameters.

    factors: of up or down by name, for a dense W of that standard deviation.
    """

    is_product = True

    def up(self) -> Parameters:
        D, F = self.model.d_model, self.model.ff_width
        bias = Parameter((*self.packed, F), "vector", ZEROS, sharded=len(self.packed))
        return {**self.factors("up", matrix_std(self.model, D)), **({"bias": bias} if self.model.bias_mlp else {})}

    def down(self) -> Parameters:
        D, F = self.model.d_model, self.model.ff_width
        bias = Parameter((D,), "vector", ZEROS)
        return {**self.factors("down", residual_std(self.model, F)), **({"bias": bias} if self.model.bias_mlp else {})}

    @abstractmethod
    def factors(self, direction: Direction, std: float) -> Parameters:
        """What W is a product of."""

    @abstractmethod
    def multiply_up(self, weights: Weights, x_I: Tensor, axis: Axis, edges: Edges) -> Tensor:
        """W x: from what is equal on all ranks to this rank's outputs, pack by pack."""

    @abstractmethod
    def multiply_down(self, weights: Weights, x_I_local: Tensor, axis: Axis, edges: Edges) -> Tensor:
        """W x: from this rank's inputs to the sum over the ranks."""


def factor_stds(std: float, n_inputs: int, fan_ins: tuple[int, int]) -> tuple[float, float]:
    """For two factors whose product has outputs of the variance that a dense matrix of std gives.

    fan_ins: numbers that one output of each factor sums. The first factor keeps the variance of its input.
    """
    first, second = fan_ins
    return first**-0.5, std * math.sqrt(n_inputs / second)


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """left (*, O, r) and right (*, r, I), whose product is the nearest of its rank; singular values go to both alike.

    From the eigenvectors of the smaller Gram matrix, several times faster than a singular value decomposition. What
    squaring loses is far below 32 bits: the product is weight, projected onto a subspace that is orthonormal anyway.
    Source: Eckart & Young 1936.
    """
    import torch  # computes: what is declared is read without it

    if weight.shape[-2] > weight.shape[-1]:
        left, right = truncated(weight.transpose(-2, -1), rank)
        return right.transpose(-2, -1), left.transpose(-2, -1)
    vectors = torch.linalg.eigh(weight @ weight.transpose(-2, -1)).eigenvectors[..., -rank:].flip(-1)
    right = vectors.transpose(-2, -1) @ weight
    root = right.norm(dim=-1, keepdim=True).sqrt()
    return vectors * root.transpose(-2, -1), right / root.clamp_min(torch.finfo(root.dtype).tiny)


def grid_product(x_I: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """x (*, K W), first (K, J R, W), second (J, H, K R) → y (*, J H): two block-diagonal factors, L Pᵀ R x.

    Source: Dao et al. 2022, section 3.1.
    """
    import torch  # likewise

    K, _, W = first.shape
    J, H, _ = second.shape
    x_KNW = x_I.reshape(-1, K, W).transpose(0, 1)
    z_KNJR = torch.bmm(x_KNW, first.transpose(1, 2)).unflatten(2, (J, -1))
    z_JNKR = z_KNJR.permute(2, 1, 0, 3).flatten(2)
    y_JNH = torch.bmm(z_JNKR, second.transpose(1, 2))
    return y_JNH.transpose(0, 1).reshape(*x_I.shape[:-1], J * H)
