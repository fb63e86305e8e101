"""Bias, dropout, residual and LayerNorm, between one sub-layer and the next: what proves and measures the chain."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from megagpt.ops.bias_dropout_add import bias_dropout_add
from megagpt.ops.norm import layer_norm
from tests.ops.case import Arguments, Case, Draw, Shape, Spec
from tests.ops.cases import bias_dropout_add as front

EPS = 1e-5


def chain(
    x_BTD: Tensor,
    bias_D: Tensor | None,
    residual_BTD: Tensor,
    sample_ids_B: Tensor,
    weight_D: Tensor,
    shift_D: Tensor,
    *,
    kernels: str = "auto",
    **mask,
) -> Tensor:
    """layer_norm(residual + dropout(x + bias))."""
    total_BTD = bias_dropout_add(x_BTD, bias_D, residual_BTD, sample_ids_B, **mask, kernels=kernels)
    return layer_norm(total_BTD, weight_D, shift_D, EPS, kernels=kernels)


def eager(
    x_BTD: Tensor,
    bias_D: Tensor,
    residual_BTD: Tensor,
    sample_ids_B: Tensor,
    weight_D: Tensor,
    shift_D: Tensor,
    *,
    p: float,
    **key,
) -> Tensor:
    """With torch's dropout, whose mask depends on the layout."""
    total_BTD = residual_BTD + F.dropout(x_BTD + bias_D, p)
    return F.layer_norm(total_BTD, weight_D.shape, weight_D, shift_D, EPS)


def normed(make):
    """The inputs of a case of bias_dropout_add, and those of the norm."""

    def make_all(draw: Draw) -> Arguments:
        inputs = make(draw)
        columns = inputs["x_BTD"].shape[-1]
        return {**inputs, "weight_D": draw.normal(columns), "shift_D": draw.normal(columns)}

    return make_all


def one_element(draw: Draw) -> Arguments:
    """Its normal is zero, and so are most gradients: few bits, so that none is lost."""
    x, bias, residual, weight = (draw.values(v) for v in ([[0.5]], [0.25], [[1.0]], [0.75]))
    inputs = {"x_BTD": x, "bias_D": bias, "residual_BTD": residual, "weight_D": weight, "shift_D": draw.normal(1)}
    return {**inputs, "sample_ids_B": draw.integers(0, 9, 1), "p": 0.5, "seed": 1, "site": 2}


ROUNDED = {"looser": 2.0, "why_looser": "the sum is rounded to the dtype before it is normalised"}

CASES = (
    Case("one element", chain, one_element),
    Case("empty", chain, normed(front.shaped(0, 3, 0))),
    Case("odd", chain, normed(front.shaped(3, 5, 7, offset=2)), **ROUNDED),
    Case("whole packs", chain, normed(front.shaped(2, 9, 24)), **ROUNDED),
    Case("plain", chain, normed(front.shaped(2, 9, 24, p=0.0)), **ROUNDED),
    Case("extreme values", chain, normed(front.extreme), nan=True),
    Case("small", chain, normed(front.shaped(2, 3, 5, offset=6)), gradcheck=True, **ROUNDED),
)


def nbytes(passes: int):
    return lambda arguments: passes * arguments["x_BTD"].numel() * arguments["x_BTD"].element_size()


def shape(name: str, *size: int, devices: tuple[str, ...]) -> Shape:
    make = normed(front.shaped(*size, p=0.1))
    # Forward: x, residual, their sum, the result. Backward: the gradient, the sum, dx and the residual's.
    return Shape(name, make, forward_bytes=nbytes(4), backward_bytes=nbytes(4), devices=devices)


SPEC = Spec(
    op="bias_dropout_add_norm",
    call=chain,
    cases=CASES,
    branches=False,
    eager=eager,
    shapes=(
        shape("4 x 1024 x 768", 4, 1024, 768, devices=("cpu",)),
        shape("2 x 1024 x 1600", 2, 1024, 1600, devices=("cpu",)),
        shape("8 x 2048 x 1K", 8, 2048, 1024, devices=("cuda",)),
        shape("8 x 2048 x 4K", 8, 2048, 4096, devices=("cuda",)),
        shape("2 x 2048 x 16K", 2, 2048, 16384, devices=("cuda",)),
    ),
)
