"""Bias, dropout and residual: what proves and measures them."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from megagpt.ops.bias_dropout_add import bias_dropout_add
from tests.ops.case import Arguments, Case, Draw, Shape, Spec, preset_widths


def shaped(*shape: int, p: float = 0.3, offset: int = 0, bias: bool = True):
    """Inputs of a shape, of samples whose ids need all 64 bits."""

    def make(draw: Draw) -> Arguments:
        return {
            "x_BTD": draw.normal(*shape),
            "bias_D": draw.normal(shape[-1]) if bias else None,
            "residual_BTD": draw.normal(*shape),
            "sample_ids_B": draw.integers(0, 2**62, shape[0]),
            "p": p,
            "seed": 2**32 - 1,
            "site": 77,
            "offset": offset,
        }

    return make


def extreme(draw: Draw) -> Arguments:
    values = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0, -0.0, 1e-30]).repeat(2, 5)
    bias, residual = draw.normal(40), draw.values(values.flip(1))
    ids = draw.integers(0, 9, 2)
    mask = {"sample_ids_B": ids, "p": 0.5, "seed": 1, "site": 2}
    return {"x_BTD": draw.values(values), "bias_D": bias, "residual_BTD": residual, **mask}


CASES = tuple(
    Case(name, bias_dropout_add, make, nan=name == "extreme values", gradcheck=name == "small")
    for name, make in (
        ("one element", shaped(1, 1)),
        ("empty", shaped(0, 3, 0)),
        ("no samples", shaped(0, 3, 5)),
        ("odd", shaped(3, 5, 7, offset=2)),
        ("odd, no bias", shaped(3, 5, 7, bias=False)),
        ("odd, plain", shaped(3, 5, 7, p=0.0)),
        ("whole packs", shaped(2, 9, 24)),
        ("whole packs, no bias", shaped(2, 9, 24, bias=False, offset=2**33 + 4)),
        ("whole packs, plain", shaped(2, 9, 24, p=0.0)),
        ("whole packs, plain, no bias", shaped(2, 9, 24, p=0.0, bias=False)),
        ("an offset within a block", shaped(2, 9, 24, offset=2**34 + 5)),
        ("wider than what the CPU draws at once", shaped(2, 2, 520)),
        ("more rows than parts", shaped(2, 150, 120)),
        ("extreme values", extreme),
        ("small", shaped(2, 3, 5, offset=6)),
    )
)


WIDTHS = [
    Case(f"{width}", bias_dropout_add, shaped(1, 2, width)) for width in preset_widths(lambda model, _: model.d_model)
]


def nbytes(passes: int):
    return lambda arguments: passes * arguments["x_BTD"].numel() * arguments["x_BTD"].element_size()


def shape(name: str, *size: int, p: float = 0.1, devices: tuple[str, ...]) -> Shape:
    return Shape(name, shaped(*size, p=p), forward_bytes=nbytes(3), backward_bytes=nbytes(2), devices=devices)


def eager(
    x_BTD: Tensor,
    bias_D: Tensor | None,
    residual_BTD: Tensor,
    sample_ids_B: Tensor,
    *,
    p: float,
    seed: int,
    site: int,
    offset: int = 0,
) -> Tensor:
    """With torch's dropout, whose mask depends on the layout."""
    return F.dropout(x_BTD if bias_D is None else x_BTD + bias_D, p) + residual_BTD


SPEC = Spec(
    op="bias_dropout_add",
    call=bias_dropout_add,
    cases=CASES,
    widths=WIDTHS,
    eager=eager,
    shapes=(
        shape("4 x 1024 x 768", 4, 1024, 768, devices=("cpu",)),
        shape("2 x 1024 x 1600", 2, 1024, 1600, devices=("cpu",)),
        shape("4 x 1024 x 768, p = 0", 4, 1024, 768, p=0.0, devices=("cpu",)),
        shape("8 x 2048 x 1K", 8, 2048, 1024, devices=("cuda",)),
        shape("8 x 2048 x 4K", 8, 2048, 4096, devices=("cuda",)),
        shape("8 x 2048 x 4K, p = 0", 8, 2048, 4096, p=0.0, devices=("cuda",)),
        shape("2 x 2048 x 16K", 2, 2048, 16384, devices=("cuda",)),
    ),
)
