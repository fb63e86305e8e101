"""Numbers drawn by counting: each is a function of a key and of its place, whoever computes it, when, and beside what.

Words come from Philox4x32-10, of dropout masks (ops/dropout.py) and of first weights (parallel/initial.py) alike. For
weights, words 2 i and 2 i + 1 of a key are made into elements 2 i and 2 i + 1 of a standard normal, by Box and Muller.
What is computed on the way are sums, products, quotients and roots in float64, which IEEE 754 rounds in one way, in one
order: the same bits on each machine, in PyTorch here and in C++ (csrc/normal.cpp).

Source: Salmon et al. 2011 (Philox); Box & Muller 1958.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

_built: ModuleType | None
try:
    from megagpt import _normal as _built
except ImportError:  # without a C++ compiler
    _built = None

_CHUNK = 1 << 16  # elements that PyTorch draws at once: what a core's cache holds


def philox_reference(counter_lo: Tensor, counter_hi: Tensor, key: tuple[int, int]) -> list[Tensor]:
    """Four words (int64 tensors) of Philox4x32-10 for counters of two 64-bit halves, broadcast together."""
    low = 0xFFFFFFFF
    c0, c1 = counter_lo & low, (counter_lo >> 32) & low
    c2, c3 = counter_hi & low, (counter_hi >> 32) & low
    k0, k1 = key[0] & low, key[1] & low
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wraps in int64; the 64 bits are right all the same
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def fill_normal(out_N: Tensor, key: int, std: float, first: int, row: int, stride: int, built: bool = True) -> None:
    """Fill with elements of the normal of a key, times std: `row` of them from `first` on, as many `stride` further, …

    out_N: float32, in host memory, without gaps.  key: 64 bits.  built: by C++ where that is built.
    Takes the time of N elements, some 5 ns each (in PyTorch 150), and no memory (some 10 MB).
    """
    if built and _built is not None:
        _built.fill(out_N.detach().numpy(), key, std, first, row, stride)
        return
    for begin in range(0, len(out_N), _CHUNK):
        chunk_N = out_N[begin : begin + _CHUNK]
        places_N = torch.arange(begin, begin + len(chunk_N), device="cpu")
        elements_N = first + places_N.div(row, rounding_mode="floor") * stride + places_N % row
        whole_blocks = (first | row | stride | len(chunk_N)) % 4 == 0
        chunk_N.copy_(_normal_reference(elements_N, key, whole_blocks) * std)


def _normal_reference(elements_N: Tensor, key: int, whole_blocks: bool) -> Tensor:
    """Elements of a standard normal in float64. whole_blocks: they are 4 b to 4 b + 3 for some b, time and again."""
    blocks = (elements_N[::4] if whole_blocks else elements_N) >> 2
    words = philox_reference(blocks, torch.zeros_like(blocks), (key, key >> 32))
    four_N4 = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], dim=-1)
    return four_N4.flatten() if whole_blocks else four_N4.gather(-1, (elements_N & 3)[:, None]).squeeze(-1)


def _box_muller(radius_word: Tensor, angle_word: Tensor) -> tuple[Tensor, Tensor]:
    """√(-2 ln u) times (cos, sin)(2 π t), of u = (word + 1/2) / 2³² and t = word / 2³²."""
    radius = (-2.0 * _log((radius_word.double() + 0.5) * 2.0**-32)).sqrt()
    # A quarter turn times 0 to 3, and an angle of at most an eighth of a turn to both sides, exactly.
    quarter = (angle_word + (1 << 29)) >> 30
    angle = (angle_word - (quarter << 30)).double() * (2.0**-32 * (2 * math.pi))
    square = angle * angle
    sin, cos = angle * _horner(_SIN, square), _horner(_COS, square)
    odd, second, third = quarter % 2 == 1, (quarter + 1) & 2 == 2, quarter & 2 == 2
    x, y = torch.where(odd, sin, cos), torch.where(odd, cos, sin)
    return radius * torch.where(second, -x, x), radius * torch.where(third, -y, y)


def _log(u: Tensor) -> Tensor:
    """ln of what lies between 0 and 1: of its power of two, and of the rest m by 2 artanh((m - 1) / (m + 1))."""
    m, power = torch.frexp(u)
    small = m < math.sqrt(0.5)
    m, power = torch.where(small, m + m, m), power.double() - small.double()
    s = (m - 1.0) / (m + 1.0)
    return power * _LN_2 + s * _horner(_ARTANH, s * s)


def _horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """c₀ + x (c₁ + x (c₂ + …))."""
    total = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = c + x * total
    return total


_LN_2 = 0.6931471805599453  # a libm need not round it so
# Taylor's, to float64's last digit but three or so, where the argument is as small as above.
_ARTANH = tuple(2.0 / (2 * k + 1) for k in range(9))
_SIN = tuple((-1) ** k / math.factorial(2 * k + 1) for k in range(8))
_COS = tuple((-1) ** k / math.factorial(2 * k) for k in range(8))
