"""How far two correct results may lie apart, per number format: one table, each entry with its reason."""

from __future__ import annotations

import torch
from torch import Tensor

# Share of the largest element of the expected tensor: a sum's round-off scales with its terms, not with its result.
TOLERANCES = {
    # 53 bits, 1.1e-16: sums of at most some 1e4 terms, in another order; measured: below 1e-14.
    torch.float64: 1e-12,
    # 24 bits, 6e-8: the same sums, through a few layers; measured: below 3e-6.
    torch.float32: 1e-5,
    # 11 bits, 4.9e-4: each of a few intermediate results is rounded to the format.
    torch.float16: 4e-3,
    # 8 bits, 3.9e-3: the same.
    torch.bfloat16: 3e-2,
}


def assert_close(actual: Tensor, expected: Tensor, what: str = "", dtype: torch.dtype | None = None) -> None:
    """Compare with the tolerance of dtype (default: actual's), relative to expected's largest element."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    allowed = TOLERANCES[dtype or actual.dtype] * expected.abs().max().item() if expected.numel() else 0.0
    error = (actual.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert error <= allowed, f"{what} differs by {error:.3g}, allowed {allowed:.3g}"


def assert_equal(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Bitwise equality; NaN equals NaN."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}")
