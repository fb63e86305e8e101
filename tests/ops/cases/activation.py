"""Bias and activation: what proves and measures it."""

from __future__ import annotations

import math
from collections.abc import Callable

from megagpt.ops.activation import FUNCTIONS, activation
from tests.ops.case import Arguments, Case, Draw, Shape, Spec, preset_widths


def shaped(*shape: int, kind: str, gated: bool = False, bias: bool = True):
    """x over both tails, and a bias."""

    def make(draw: Draw) -> Arguments:
        b = {"bias": draw.normal(shape[-1])} if bias else {}
        return {"x": draw.normal(*shape, scale=3.0), **b, "kind": kind, "gated": gated}

    return make


def extreme(kind: str, gated: bool):
    """Every extreme value as the activation's argument; as a gate, of ones."""

    def make(draw: Draw) -> Arguments:
        x = [math.inf, -math.inf, math.nan, 1e30, -1e30, 100.0, -100.0, 0.0, -0.0, 1e-30]
        return {"x": draw.values(x + [1.0] * len(x) * gated), "bias": None, "kind": kind, "gated": gated}

    return make


def each_kind() -> list[Case]:
    """What depends on the function, not on the layout."""
    cases = []
    for kind in FUNCTIONS:
        cases += [
            Case(f"{kind}", activation, shaped(9, 24, kind=kind)),
            Case(f"{kind} gated", activation, shaped(9, 48, kind=kind, gated=True)),
            Case(f"{kind} extreme values", activation, extreme(kind, gated=False), nan=True),
            Case(f"{kind} gated extreme values", activation, extreme(kind, gated=True), nan=True),
            Case(f"{kind} gated small", activation, shaped(2, 6, kind=kind, gated=True), gradcheck=True),
        ]
    return cases


CASES = (
    Case("one element", activation, shaped(1, kind="gelu", bias=False)),
    Case("empty", activation, shaped(3, 0, kind="silu", gated=True)),
    Case("no rows", activation, shaped(0, 8, kind="gelu")),
    Case("without bias", activation, shaped(5, 16, kind="gelu_tanh", bias=False)),
    Case("without bias, gated", activation, shaped(5, 16, kind="silu", gated=True, bias=False)),
    Case("odd", activation, shaped(3, 5, 7, kind="gelu_tanh")),
    Case("odd gated", activation, shaped(3, 5, 14, kind="silu", gated=True)),
    Case("a thread more than one block", activation, shaped(3, 2056, kind="relu2")),
    Case("many rows", activation, shaped(2100, 8, kind="gelu_tanh")),
    Case("many rows, gated", activation, shaped(2100, 16, kind="silu", gated=True)),
    *each_kind(),
    Case("small", activation, shaped(2, 5, kind="gelu_tanh"), gradcheck=True),
)


WIDTHS = [
    Case(f"{width}{', gated' if gated else ''}", activation, shaped(2, width * (1 + gated), kind="silu", gated=gated))
    for width, gated in preset_widths(lambda model, tp: (model.ff_width // tp, model.gated))
]


def nbytes(x: int, y: int):
    """So many passes over x and over y: the bias is nothing beside them."""

    def count(arguments: Arguments) -> int:
        n = arguments["x"].numel() * arguments["x"].element_size()
        return x * n + y * n // (2 if arguments["gated"] else 1)

    return count


def shape(name: str, make: Callable[[Draw], Arguments], *devices: str) -> Shape:
    return Shape(name, make, forward_bytes=nbytes(1, 1), backward_bytes=nbytes(2, 1), devices=devices)


SPEC = Spec(
    op="activation",
    call=activation,
    cases=CASES,
    widths=WIDTHS,
    shapes=(
        shape("bias gelu, 4096 x 3072", shaped(4096, 3072, kind="gelu"), "cpu"),
        shape("bias gelu tanh, 2048 x 3072", shaped(2048, 3072, kind="gelu_tanh"), "cpu"),
        shape("bias gelu, 512 x 768", shaped(512, 768, kind="gelu"), "cpu"),
        shape("SwiGLU, 2048 x 2*2048", shaped(2048, 4096, kind="silu", gated=True, bias=False), "cpu"),
        shape("bias gelu tanh, 16K x 16K", shaped(16384, 16384, kind="gelu_tanh"), "cuda"),
        shape("SwiGLU, 16K x 2*11008", shaped(16384, 22016, kind="silu", gated=True, bias=False), "cuda"),
    ),
)
