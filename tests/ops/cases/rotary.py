"""Rotary embedding: what proves and measures it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from megagpt.ops.rotary import rotary, rotary_frequencies, rotary_tables
from tests.ops.case import Arguments, Case, Draw, Shape, Spec, preset_widths


def tables(draw: Draw, seq_len: int, d_rotary: int) -> Arguments:
    dtype = torch.float64 if draw.dtype == torch.float64 else torch.float32
    cos, sin = rotary_tables(seq_len, rotary_frequencies(d_rotary), device=draw.device, dtype=dtype)
    return {"cos_SR": cos, "sin_SR": sin}


def shaped(*shape: int, d_rotary: int | None = None, seq_len: int | None = None, **how):
    """qkv of a shape, wholly rotated unless d_rotary says otherwise, with tables of seq_len rows."""

    def make(draw: Draw) -> Arguments:
        d = shape[-1] if d_rotary is None else d_rotary
        return {"qkv_BTGXK": draw.normal(*shape), **tables(draw, seq_len or shape[1], d), **how}

    return make


def positioned(draw: Draw) -> Arguments:
    """Two packed documents and repeated tokens: rows of the tables in any order."""
    arguments = shaped(2, 6, 2, 3, 16, seq_len=50)(draw)
    return {**arguments, "positions_BT": draw.integers(0, 50, 2, 6)}


def extreme(draw: Draw) -> Arguments:
    """Each extreme value beside ones, rotated and copied."""
    values = torch.ones(1, 8, 1, 2, 4, dtype=torch.float64)
    values[0, :, 0, :, 1] = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0, -0.0, 1e-30])[:, None]
    return {"qkv_BTGXK": draw.values(values), **tables(draw, 8, 4)}


def both_conventions(name: str, make_shaped: Callable[[bool], Callable[[Draw], Arguments]]) -> list[Case]:
    return [Case(f"{name}, {text}", rotary, make_shaped(b)) for b, text in ((False, "halves"), (True, "interleaved"))]


CASES = (
    Case("one element", rotary, shaped(1, 1, 1, 1, 1, d_rotary=0)),
    Case("empty", rotary, shaped(2, 0, 2, 3, 8)),
    Case("no elements", rotary, shaped(2, 3, 2, 3, 0)),
    *both_conventions("whole packs", lambda b: shaped(2, 5, 3, 3, 64, interleaved=b)),
    *both_conventions("one pack a half", lambda b: shaped(1, 3, 2, 3, 16, interleaved=b)),
    *both_conventions("odd", lambda b: shaped(2, 3, 2, 3, 7, d_rotary=6, interleaved=b)),
    *both_conventions("partial, an odd number of packs", lambda b: shaped(1, 3, 2, 3, 40, d_rotary=16, interleaved=b)),
    *both_conventions("partial, elements", lambda b: shaped(1, 3, 2, 3, 24, d_rotary=10, interleaved=b)),
    Case("grouped queries", rotary, shaped(2, 3, 2, 6, 16)),
    Case("all heads", rotary, shaped(2, 3, 2, 3, 16, n_rotated_heads=3)),
    Case("no head", rotary, shaped(2, 3, 2, 3, 16, n_rotated_heads=0)),
    Case("longer tables", rotary, shaped(2, 3, 2, 3, 16, seq_len=9)),
    Case("more heads than a block takes at once", rotary, shaped(1, 2, 90, 3, 32)),
    Case("a head wider than a block", rotary, shaped(1, 2, 1, 2, 1031, d_rotary=1030)),
    Case("positions", rotary, positioned),
    Case("extreme values", rotary, extreme, nan=True),
    Case("small, interleaved", rotary, shaped(1, 3, 1, 3, 4, interleaved=True), gradcheck=True),
    Case("small", rotary, shaped(1, 3, 1, 3, 5, d_rotary=4), gradcheck=True),
)


def nbytes(arguments: Arguments) -> int:
    """In and out; the tables are nothing beside them."""
    x: Tensor = arguments["qkv_BTGXK"]
    return 2 * x.numel() * x.element_size()


def shape(name: str, make: Callable[[Draw], Arguments], *devices: str) -> Shape:
    return Shape(name, make, forward_bytes=nbytes, backward_bytes=nbytes, devices=devices)


WIDTHS = [
    Case(f"heads of {width}", rotary, shaped(1, 3, 2, 3, width)) for width in preset_widths(lambda m, _: m.head_width)
]

SPEC = Spec(
    op="rotary",
    call=rotary,
    cases=CASES,
    widths=WIDTHS,
    shapes=(
        shape("GPT-2 small, 2 x 1024", shaped(2, 1024, 12, 3, 64), "cpu"),
        shape("GPT-2 small, interleaved", shaped(2, 1024, 12, 3, 64, interleaved=True), "cpu"),
        shape("LLaMA 7B, 4 x 4096", shaped(4, 4096, 32, 3, 128), "cuda"),
        shape("LLaMA 7B, interleaved", shaped(4, 4096, 32, 3, 128, interleaved=True), "cuda"),
    ),
)
