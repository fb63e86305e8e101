"""Numbers drawn by counting: what they are, in C++ and in PyTorch, of any slice; and that they are normal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megagpt import philox
from megagpt.philox import fill_normal

KEY = 0xFEDCBA9876543210
BUILT = [False, pytest.param(True, marks=pytest.mark.skipif(philox._built is None, reason="run `make build`"))]


def normal(
    n: int, first: int = 0, row: int | None = None, stride: int = 0, key: int = KEY, built: bool = True
) -> Tensor:
    out = torch.empty(n)
    fill_normal(out, key, 1.0, first, row or max(1, n), stride, built)
    return out


def by_math(element: int) -> float:
    """An element as the formula says, by the platform's own functions, and Philox in whole numbers."""
    words = [int(word) for word in philox.philox_reference(*torch.tensor([element >> 2, 0]), (KEY, KEY >> 32))]
    radius_word, angle_word = words[element & 2 : (element & 2) + 2]
    radius = math.sqrt(-2 * math.log((radius_word + 0.5) / 2**32))
    return radius * (math.sin if element & 1 else math.cos)(2 * math.pi * angle_word / 2**32)


@pytest.mark.parametrize("built", BUILT)
def test_elements_are_box_and_muller_s(built: bool):
    for first in (0, 2**33 + 5, 2**44 - 3):
        assert normal(200, first, built=built).tolist() == pytest.approx(
            [by_math(first + i) for i in range(200)], rel=1e-7, abs=1e-9
        )


@pytest.mark.parametrize("built", BUILT)
def test_bits_are_those_of_every_machine(built: bool):
    """They come from what IEEE 754 rounds in one way: as recorded with and without AVX, by GCC and by PyTorch."""
    wanted = ["0x1.94b44a0000000p-1", "0x1.aba3040000000p-4", "0x1.6799920000000p-4", "0x1.392a2a0000000p-2"]
    assert [x.hex() for x in normal(4, built=built).tolist()] == wanted
    assert normal(1 << 20, built=built).view(torch.int32).sum().item() == -18858602219935
    out = torch.empty(5)
    fill_normal(out, KEY, 0.02, 3, 5, 0, built)
    assert out[4].item().hex() == "-0x1.165a200000000p-5"  # rounded once, after the product


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize(("first", "row", "stride"), [(0, 64, 256), (3, 7, 19), (1, 1, 2), (8, 8, 20), (5, 500, 501)])
def test_a_slice_has_the_elements_of_the_whole(first: int, row: int, stride: int, built: bool):
    places = torch.arange(300)
    wanted = normal(first + 300 * stride)[first + places // row * stride + places % row]
    assert torch.equal(normal(300, first, row, stride, built=built), wanted)


@pytest.mark.parametrize("built", BUILT)
def test_a_long_one_is_drawn_in_chunks_of_no_consequence(built: bool):
    n = 2 * philox._CHUNK + 6
    whole = normal(n, built=built)
    assert torch.equal(whole[-50:], normal(50, n - 50, built=built)) and normal(0, built=built).shape == (0,)


def test_numbers_are_normal():
    """Mean, variance, skewness, kurtosis within 5 standard errors; the largest gap to the distribution; the tails."""
    n = 1 << 21
    x = normal(n).double()
    for moment, wanted, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(x.pow(moment).mean().item() - wanted) < 5 * math.sqrt(variance / n), moment
    below = 0.5 * torch.erfc(-x.sort().values / math.sqrt(2))
    gap = (below - (torch.arange(n) + 0.5) / n).abs().max().item()
    assert gap < 2.2 / math.sqrt(n)  # Kolmogorov: exceeded once in 8,000
    for tail in (2.0, 3.0, 4.0, 4.5):
        wanted = n * math.erfc(tail / math.sqrt(2))
        assert abs((x.abs() > tail).sum().item() - wanted) < 5 * math.sqrt(wanted), tail


def test_neighbours_do_not_know_each_other():
    """Neither elements, nor their squares; nor those of a pair, a block, a row of 768; nor of keys that are near."""
    n = 1 << 20
    x, other = normal(n).double(), normal(n, key=KEY + 1).double()
    pairs = {lag: (x[:-lag], x[lag:]) for lag in (1, 2, 3, 4, 8, 768)}
    pairs |= {f"pair {k}": (x[k::4], x[k + 1 :: 4]) for k in (0, 2)} | {"keys": (x, other)}
    for name, (a, b) in pairs.items():
        for f in (lambda v: v, lambda v: (v * v - 1) / math.sqrt(2)):
            assert abs((f(a) * f(b)).mean().item()) < 5 / math.sqrt(len(a)), name


def test_the_extremes_are_finite():
    """Of the smallest and the largest word: nothing is cut off before 6.7 standard deviations."""
    words = torch.tensor([0, 2**32 - 1])
    for angle in (0, 2**29, 2**30, 2**31, 3 * 2**30, 2**32 - 1):
        x, y = philox._box_muller(words, torch.full((2,), angle))
        radius = (x * x + y * y).sqrt()
        assert radius.tolist() == pytest.approx([math.sqrt(66 * math.log(2)), 2**-16], rel=1e-9)
        turn = 2 * math.pi * angle / 2**32
        assert (x / radius).tolist() == pytest.approx([math.cos(turn)] * 2, abs=1e-15)
        assert (y / radius).tolist() == pytest.approx([math.sin(turn)] * 2, abs=1e-15)
