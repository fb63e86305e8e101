"""Dropout: what proves and measures it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from megagpt.ops.dropout import dropout
from tests.ops.case import Arguments, Case, Draw, Shape, Spec


def shaped(*shape: int, p: float = 0.3, offset: int = 0):
    """x of a shape, of samples whose ids need all 64 bits."""

    def make(draw: Draw) -> Arguments:
        ids = draw.integers(0, 2**62, shape[0])
        return {"x": draw.normal(*shape), "sample_ids_B": ids, "p": p, "seed": 2**32 - 1, "site": 77, "offset": offset}

    return make


def part_of_matrices(*shape: int, within: tuple[int, int], offset: int):
    """Of each head's matrix a part, as a block of queries and the keys that it sees are."""

    def make(draw: Draw) -> Arguments:
        return {**shaped(*shape, offset=offset)(draw), "within": within}

    return make


def extreme(draw: Draw) -> Arguments:
    values = torch.tensor([math.inf, -math.inf, math.nan, 1e30, -1e30, 0.0, -0.0, 1e-30]).repeat(2, 5)
    return {"x": draw.values(values), "sample_ids_B": draw.integers(0, 9, 2), "p": 0.5, "seed": 1, "site": 2}


CASES = (
    Case("one element", dropout, shaped(1, 1)),
    Case("empty", dropout, shaped(0, 3)),
    Case("samples of no elements", dropout, shaped(3, 0)),
    Case("one number a sample", dropout, shaped(9)),
    Case("odd", dropout, shaped(3, 5, 7)),
    Case("whole packs", dropout, shaped(2, 16, 24)),
    Case("packs from a whole block on", dropout, shaped(2, 64, offset=2**33 + 4)),
    Case("an offset within a block", dropout, shaped(2, 64, offset=2**34 + 5)),
    Case("one more than the CPU draws at once", dropout, shaped(2, 513, offset=1)),
    Case("parts of matrices", dropout, part_of_matrices(2, 3, 5, 6, within=(9, 11), offset=2**33 + 14)),
    Case("parts of matrices, whole packs", dropout, part_of_matrices(2, 3, 4, 16, within=(8, 24), offset=32)),
    Case("parts of matrices, packs amid blocks", dropout, part_of_matrices(2, 3, 4, 16, within=(8, 22), offset=4)),
    Case("almost all dropped", dropout, shaped(2, 40, p=0.999)),
    Case("extreme values", dropout, extreme, nan=True),
    Case("small", dropout, shaped(2, 3, 5, offset=6), gradcheck=True),
)


def nbytes(arguments: Arguments) -> int:
    return 2 * arguments["x"].numel() * arguments["x"].element_size()


def shape(name: str, *size: int, devices: tuple[str, ...]) -> Shape:
    return Shape(name, shaped(*size, p=0.1), forward_bytes=nbytes, backward_bytes=nbytes, devices=devices)


def eager(x: Tensor, sample_ids_B: Tensor, *, p: float, seed: int, site: int, offset: int = 0) -> Tensor:
    """torch's dropout, whose mask depends on the layout."""
    return F.dropout(x, p)


SPEC = Spec(
    op="dropout",
    call=dropout,
    cases=CASES,
    eager=eager,
    shapes=(
        shape("4 x 1024 x 768", 4, 1024, 768, devices=("cpu",)),
        shape("attention, 1 x 12 x 512 x 512", 1, 12, 512, 512, devices=("cpu",)),
        shape("8 x 2048 x 1K", 8, 2048, 1024, devices=("cuda",)),
        shape("8 x 2048 x 4K", 8, 2048, 4096, devices=("cuda",)),
        shape("attention, 8 x 16 x 1K x 1K", 8, 16, 1024, 1024, devices=("cuda",)),
    ),
)
