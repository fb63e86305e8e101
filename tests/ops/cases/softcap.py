"""Soft cap: what proves and measures it."""

from __future__ import annotations

import math

from megagpt.ops.softcap import softcap
from tests.ops.case import Arguments, Case, Draw, Shape, Spec


def shaped(*shape: int, scale: float = 20.0):
    """x of a shape, spread over the linear and the flat part."""

    def make(draw: Draw) -> Arguments:
        return {"x": draw.normal(*shape, scale=scale), "cap": 30.0}

    return make


def extreme(draw: Draw) -> Arguments:
    return {"x": draw.values([math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0, -0.0, 1e-30]), "cap": 30.0}


CASES = (
    Case("one element", softcap, shaped(1)),
    Case("empty", softcap, shaped(3, 0)),
    Case("odd", softcap, shaped(3, 5, 7)),
    Case("whole packs", softcap, shaped(4, 256)),
    Case("one more than packs", softcap, shaped(1025)),
    Case("extreme values", softcap, extreme, nan=True),
    Case("small", softcap, shaped(2, 5), gradcheck=True),
)


def nbytes(passes: int):
    return lambda arguments: passes * arguments["x"].numel() * arguments["x"].element_size()


def shape(name: str, *size: int, devices: tuple[str, ...]) -> Shape:
    return Shape(name, shaped(*size), forward_bytes=nbytes(2), backward_bytes=nbytes(3), devices=devices)


SPEC = Spec(
    op="softcap",
    call=softcap,
    cases=CASES,
    shapes=(
        shape("GPT-2 logits, 64 rows", 64, 50304, devices=("cpu",)),
        shape("4096 x 16K", 4096, 16384, devices=("cuda",)),
    ),
)
