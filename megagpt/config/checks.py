"""Checks that a section's fields need one by one, and the shape that every message has."""

from __future__ import annotations

import math

from megagpt.errors import UserError

MAX_INT = 2**63 - 1
_TOO_LARGE = ("must be at most 2^63 - 1", "use a number that a run can reach")


def require(ok: bool, got: str, wanted: str, remedy: str) -> None:
    """Raise `UserError` "got: wanted; remedy" unless ok."""
    if not ok:
        raise UserError(f"{got} {wanted}; {remedy}")


def is_finite(value: float) -> bool:
    """Whether value is neither NaN nor infinite."""
    return isinstance(value, int) or math.isfinite(value)  # an integer may be too large to be made a float


def positive(section: str, config: object, *names: str) -> None:
    """Raise `UserError` where one of these fields is not above 0; None passes."""
    for name in names:
        value = getattr(config, name)
        ok = value is None or (is_finite(value) and value > 0)
        remedy = "use 1 or more" if isinstance(value, int) else "use a finite number above 0"
        require(ok, f"{section}.{name}={value}", "must be positive", remedy)
        require(not isinstance(value, int) or value <= MAX_INT, f"{section}.{name}={value}", *_TOO_LARGE)


def not_negative(section: str, config: object, *names: str) -> None:
    """Raise `UserError` where one of these fields is below 0; None passes."""
    for name in names:
        value = getattr(config, name)
        ok = value is None or (is_finite(value) and value >= 0)
        require(ok, f"{section}.{name}={value}", "must be finite and not negative", "0 turns it off")
        require(not isinstance(value, int) or value <= MAX_INT, f"{section}.{name}={value}", *_TOO_LARGE)


def fraction(section: str, config: object, *names: str) -> None:
    """Raise `UserError` where one of these fields is not in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        ok = 0.0 <= value < 1.0  # false for NaN too
        require(ok, f"{section}.{name}={value}", "must be at least 0 and below 1", "use for example 0.1")


def divisors(n: int, limit: int = 256) -> list[int]:
    """The divisors of n up to limit, ascending: what an error message offers."""
    return [d for d in range(1, min(n, limit) + 1) if n % d == 0]
