"""Softmax of attention scores: what proves and measures it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megagpt.ops.softmax import alibi_slopes, attention_softmax
from tests.ops.case import Arguments, Case, Draw, Shape, Spec


def scores(
    *shape: int, mask: tuple[int, ...] | None = None, open_keys: float = 0.7, alibi: bool = False, **keywords: Any
):
    """Scores of a shape with a mask of a broadcast one."""

    def make(draw: Draw) -> Arguments:
        arguments: Arguments = {"scores_BHTS": draw.normal(*shape), **keywords}
        if mask is not None:
            arguments["mask"] = draw.mask(*mask, p=open_keys)
        if alibi:
            arguments["slopes_H"] = alibi_slopes(shape[1]).to(draw.device)
        return arguments

    return make


def changed(make: Callable[[Draw], Arguments], change: Callable[[Tensor], None], name: str = "scores_BHTS"):
    """The same with some values overwritten."""

    def changed_make(draw: Draw) -> Arguments:
        arguments = make(draw)
        with torch.no_grad():
            change(arguments[name])
        return arguments

    return changed_make


def some_rows_masked(mask: Tensor) -> None:
    mask[..., ::2, :] = False


def minus_infinity(x: Tensor) -> None:
    x[:, :, ::2] = -math.inf  # whole rows
    x[..., ::3] = -math.inf


def extreme(x: Tensor) -> None:
    for row, value in enumerate((math.nan, math.inf, 1e30, -1e30)):
        x[:, :, row, row] = value
    x[:, :, 4] = -1e30
    x[:, :, 5] = math.nan
    x[:, :, :6, -1] = math.nan  # nobody may attend it


CANCELS = "p · (grad - sum of grad · p) cancels, and backward's p was rounded to the dtype"


def case(name: str, make: Callable[[Draw], Arguments], looser: float = 3.0, **keywords: Any) -> Case:
    return Case(name, attention_softmax, make, looser=looser, why_looser=CANCELS, **keywords)


EDGES = (1, 31, 32, 33, 256, 264, 512, 520, 1024, 1025, 1032, 4096, 4097)
CASES = (
    case("one element", scores(1, 1, 1, 1, scale=0.5)),
    case("empty", scores(2, 3, 0, 8, causal=True)),
    case("no keys", scores(2, 3, 4, 0, causal=True)),
    *(case(f"{n} keys", scores(1, 1, 2, n, causal=True, scale=0.3)) for n in EDGES),
    case("16K keys", scores(1, 1, 1, 16384, alibi=True, causal=True)),
    # Few of them open: float16 has no digits for the probabilities of so many.
    case("more keys than a block holds", scores(1, 1, 1, 65544, mask=(1, 1, 1, 65544), open_keys=0.01)),
    case("causal", scores(2, 2, 13, 13, causal=True, scale=0.125)),
    case("fewer queries than keys", scores(1, 2, 3, 40, causal=True)),
    case("fewer keys than queries", scores(1, 2, 40, 24, causal=True)),
    case("window of one", scores(1, 2, 9, 9, window=1, causal=True)),
    case("window both ways", scores(1, 2, 40, 40, window=5)),
    case("window of long rows", scores(1, 1, 2, 2048, window=100, causal=True)),
    case("window wider than the row", scores(1, 2, 8, 8, window=100, causal=True)),
    case("ALiBi", scores(2, 3, 20, 24, alibi=True, causal=True, scale=0.125)),
    case("ALiBi ahead too", scores(1, 3, 2, 1048, alibi=True), looser=6.0),  # few keys hold it all
    case("mask of queries and keys", scores(2, 3, 16, 16, mask=(1, 1, 16, 16))),
    case("mask of keys", scores(2, 3, 5, 1040, mask=(2, 1, 1, 1040), causal=True)),
    case("mask of queries", scores(2, 3, 16, 24, mask=(1, 3, 16, 1))),
    case("mask of all", scores(2, 3, 6, 10, mask=(2, 3, 6, 10), alibi=True, causal=True)),
    case("rows without a key", changed(scores(1, 2, 8, 16, mask=(1, 1, 8, 16)), some_rows_masked, "mask")),
    case("scores of -inf", changed(scores(1, 2, 8, 16, causal=True), minus_infinity), nan=True),
    case("extreme values", changed(scores(1, 1, 7, 8, mask=(1, 1, 7, 8), causal=True, window=6), extreme), nan=True),
    case("extreme values of long rows", changed(scores(1, 1, 7, 1031, window=1030, causal=True), extreme), nan=True),
    case("small", scores(2, 2, 4, 5, mask=(2, 1, 4, 5), causal=True, window=3, scale=0.7, alibi=True), gradcheck=True),
)


def eager(scores_BHTS: Tensor, *, causal: bool = False, scale: float = 1.0, slopes_H: Tensor | None = None) -> Tensor:
    """As one would write it: the reference without what only special values and windows need."""
    n_queries, n_keys = scores_BHTS.shape[-2:]
    keys_S = torch.arange(n_keys, device=scores_BHTS.device)
    distance_TS = keys_S - torch.arange(n_keys - n_queries, n_keys, device=scores_BHTS.device).unsqueeze(1)
    x_BHTS = scores_BHTS * scale
    if slopes_H is not None:
        x_BHTS = x_BHTS + (slopes_H.view(-1, 1, 1) * distance_TS).to(x_BHTS.dtype)
    if causal:
        x_BHTS = x_BHTS.masked_fill(distance_TS > 0, -math.inf)
    return torch.softmax(x_BHTS, dim=-1)


def nbytes(reads: int):
    """Bytes of `reads` readings of the columns that may be attended and of one result."""

    def count(arguments: Arguments) -> int:
        x = arguments["scores_BHTS"]
        n_queries, n_keys = x.shape[-2:]
        seen = sum(range(n_keys - n_queries + 1, n_keys + 1)) if arguments["causal"] else n_queries * n_keys
        return (reads * seen + n_queries * n_keys) * x.shape[0] * x.shape[1] * x.element_size()

    return count


def shape(name: str, *size: int, devices: tuple[str, ...], **keywords: Any) -> Shape:
    make = scores(*size, scale=0.125, **keywords)
    return Shape(name, make, forward_bytes=nbytes(1), backward_bytes=nbytes(2), devices=devices)


SPEC = Spec(
    op="softmax",
    call=attention_softmax,
    cases=CASES,
    shapes=(
        shape("GPT-2 causal", 2, 12, 1024, 1024, causal=True, devices=("cpu",)),
        shape("GPT-2 ALiBi", 2, 12, 1024, 1024, causal=True, alibi=True, devices=("cpu",)),
        shape("short causal", 8, 4, 256, 256, causal=True, devices=("cpu",)),
        shape("causal 8 x 16 x 1K", 8, 16, 1024, 1024, causal=True, devices=("cuda",)),
        shape("causal 8 x 16 x 2K", 8, 16, 2048, 2048, causal=True, devices=("cuda",)),
        shape("causal 4 x 16 x 4K", 4, 16, 4096, 4096, causal=True, devices=("cuda",)),
        shape("full 1 x 16 x 4K x 16K", 1, 16, 4096, 16384, causal=False, devices=("cuda",)),
    ),
    eager=eager,
)
