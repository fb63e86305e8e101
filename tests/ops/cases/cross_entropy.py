"""Cross-entropy: what proves and measures it."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.ops.cross_entropy import Statistics, cross_entropy
from tests.ops.case import Arguments, Case, Draw, Shape, Spec, preset_widths


def tokens(n_tokens: int, n_columns: int, *, scale: float = 2.0, vocab: int | None = None, **settings):
    """Logits and labels; `vocab`: labels are drawn below it, the columns may be a part of it."""

    def make(draw: Draw) -> Arguments:
        logits = draw.normal(n_tokens, n_columns, scale=scale)
        high = vocab or settings.get("n_valid", n_columns)
        return {"logits_NV": logits, "labels_N": draw.integers(0, high, n_tokens), **settings}

    return make


def extreme(draw: Draw) -> Arguments:
    inf, nan = math.inf, math.nan
    rows = [
        [-inf, 1.0, 2.0, -inf, 0.5],  # masked tokens
        [-inf, 1.0, 2.0, -inf, 0.5],  # and one of them is the label
        [-inf, -inf, -inf, -inf, -inf],
        [1.0, inf, 2.0, 3.0, 4.0],
        [1.0, nan, 2.0, 3.0, 4.0],
        [1e30, -1e30, 1e30, 0.0, 1.0],
        [-1e30, -1e30, -1e30, -1e30, -1e30],
        [1000.0, 999.0, 998.0, 1000.0, 990.0],
    ]
    logits = torch.tensor(rows).repeat(1, 3)
    return {"logits_NV": draw.values(logits), "labels_N": torch.tensor([1, 3, 0, 0, 0, 0, 2, 4], device=draw.device)}


def with_others(logits_NV: Tensor, labels_N: Tensor, others_NV: Tensor, **settings) -> Tensor:
    """The loss over `logits` and the columns after them, which `combine` knows like those of another rank."""
    n_valid = settings["n_valid"]

    def combine(here: Statistics) -> Statistics:
        wide = others_NV.to(here.top.dtype).contiguous()
        in_others = F.one_hot((labels_N - n_valid).clamp(0), wide.shape[1]) * (labels_N >= n_valid)[:, None]
        top = wide.amax(-1)
        logit = (wide * in_others).sum(-1)
        there = Statistics(top, (wide - top[:, None]).exp().sum(-1), logit, wide.sum(-1))
        top = torch.maximum(here.top, there.top)
        here, there = here.relative_to(top), there.relative_to(top)
        return Statistics(top, *(a + b for a, b in zip(here[1:], there[1:], strict=True)))

    return cross_entropy(logits_NV, labels_N, combine=combine, **settings)


def parts(n_valid: int, n_others: int):
    """A rank that holds `n_valid` columns (padded to 8), of a vocabulary of which others hold the rest."""
    vocab = n_valid + n_others
    make = tokens(6, 8, vocab=vocab, n_valid=n_valid, label_smoothing=0.1, z_loss=1e-2)

    def made(draw: Draw) -> Arguments:
        others = draw.normal(6, n_others, scale=3.0).detach()
        return {**make(draw), "others_NV": others, "vocab": vocab}

    return made


def after_four(logits_NV: Tensor, labels_N: Tensor, **settings) -> Tensor:
    """All tokens but the first four: rows of odd length in 16 bits then begin at other places than the gradient's."""
    return cross_entropy(logits_NV[4:], labels_N[4:], **settings)


SMOOTH: Any = {"label_smoothing": 0.1, "z_loss": 1e-2}
CASES = (
    Case("one element", cross_entropy, tokens(1, 1, **SMOOTH)),
    Case("no tokens", cross_entropy, tokens(0, 16)),
    Case("odd", cross_entropy, tokens(5, 37)),
    Case("smoothing", cross_entropy, tokens(5, 37, label_smoothing=0.3)),
    Case("z-loss", cross_entropy, tokens(4, 40, z_loss=0.1)),
    Case("padding", cross_entropy, tokens(4, 64, n_valid=51, **SMOOTH)),
    Case("one block", cross_entropy, tokens(2, 2048)),
    Case("several blocks", cross_entropy, tokens(3, 4999, **SMOOTH)),
    Case("part of a row of packs", cross_entropy, tokens(2, 17_001, scale=3.0, n_valid=16_999)),
    Case("rows that begin anywhere", after_four, tokens(7, 75)),
    Case("far from zero", cross_entropy, tokens(4, 129, scale=1e4)),
    Case("labels of others", cross_entropy, tokens(8, 24, vocab=72, first=24)),
    Case("with other ranks", with_others, parts(7, 5)),
    Case("without columns", with_others, parts(0, 9)),
    Case("in place", cross_entropy, tokens(4, 100, in_place=True, **SMOOTH)),
    Case("extreme values", cross_entropy, extreme, nan=True),
    Case("extreme values in place", partial(cross_entropy, in_place=True), extreme, nan=True),
    Case("small", cross_entropy, tokens(3, 11, n_valid=9, **SMOOTH), gradcheck=True),
)


WIDTHS = [
    Case(f"{width} columns", cross_entropy, tokens(2, width))
    for width in preset_widths(lambda m, tp: -(-m.vocab // tp))
]


def eager(logits_NV: Tensor, labels_N: Tensor, in_place: bool = False) -> Tensor:
    """Plain torch, which has neither padding nor a way to work in place."""
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="none")


def liger():
    """liger-kernel's fused loss, which overwrites the logits during its forward pass."""
    # A peer, which is not a requirement.
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction  # pyright: ignore[reportMissingImports]

    def call(logits_NV: Tensor, labels_N: Tensor, in_place: bool = False) -> Tensor:
        settings = (None, -100, 0.0, 0.0, "none", None, False)
        return LigerCrossEntropyFunction.apply(logits_NV, labels_N, *settings)[0]

    return call


def quack():
    """quack's fused loss, which overwrites the logits during its backward pass."""
    # A peer, which is not a requirement.
    from quack.cross_entropy import cross_entropy as theirs  # pyright: ignore[reportMissingImports]

    def call(logits_NV: Tensor, labels_N: Tensor, in_place: bool = False) -> Tensor:
        return theirs(logits_NV, labels_N, reduction="none", inplace_backward=in_place)

    return call


def nbytes(passes: int):
    return lambda arguments: passes * arguments["logits_NV"].numel() * arguments["logits_NV"].element_size()


def shape(name: str, n_tokens: int, vocab: int, device: str) -> Shape:
    make = tokens(n_tokens, vocab, in_place=True)
    return Shape(name, make, forward_bytes=nbytes(1), backward_bytes=nbytes(2), devices=(device,))


SPEC = Spec(
    op="cross_entropy",
    call=cross_entropy,
    cases=CASES,
    widths=WIDTHS,
    shapes=(
        shape("GPT-2 vocabulary, 256 tokens", 256, 50304, "cpu"),
        shape("128K vocabulary, 64 tokens", 64, 131072, "cpu"),
        shape("GPT-2 vocabulary, 8192 tokens", 8192, 50304, "cuda"),
        shape("128K vocabulary, 8192 tokens", 8192, 131072, "cuda"),
    ),
    eager=eager,
    peers={"liger": liger, "quack": quack},
)
