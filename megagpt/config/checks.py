"""Checks that a section's fields need one by one."""

from __future__ import annotations

import math
from typing import Any

from megagpt.errors import home_expanded, require

MAX_INT = 2**63 - 1
_TOO_LARGE = ("must be at most 2^63 - 1", "use a number that a run can reach")


def parsed(config: object, name: str, kind: Any) -> None:
    """Put what kind.parse makes of a field of a frozen section in its place, where the field is not a `kind` yet."""
    value = getattr(config, name)
    if not isinstance(value, kind):
        object.__setattr__(config, name, kind.parse(value))


def paths(config: object, *names: str) -> None:
    """Put the path in the place of one that begins with ~ in these fields of a frozen section."""
    for name in names:
        value = getattr(config, name)
        if value is not None:
            object.__setattr__(config, name, home_expanded(value))


def is_finite(value: float) -> bool:
    """Whether value is neither NaN nor infinite."""
    return isinstance(value, int) or math.isfinite(value)  # an integer may be too large to be made a float


def positive(section: str, config: object, *names: str) -> None:
    """Raise `UserError` where one of these fields is not above 0; None passes."""
    for name in names:
        key, value = f"{section}.{name}", getattr(config, name)
        ok = value is None or (is_finite(value) and value > 0)
        remedy = "use 1 or more" if isinstance(value, int) else "use a finite number above 0"
        require(ok, f"{key}={value}", "must be positive", remedy, key)
        require(not isinstance(value, int) or value <= MAX_INT, f"{key}={value}", *_TOO_LARGE, key)


def not_negative(section: str, config: object, *names: str) -> None:
    """Raise `UserError` where one of these fields is below 0; None passes."""
    for name in names:
        key, value = f"{section}.{name}", getattr(config, name)
        ok = value is None or (is_finite(value) and value >= 0)
        require(ok, f"{key}={value}", "must be finite and not negative", "0 turns it off", key)
        require(not isinstance(value, int) or value <= MAX_INT, f"{key}={value}", *_TOO_LARGE, key)


def fraction(section: str, config: object, *names: str) -> None:
    """Raise `UserError` where one of these fields is not in [0, 1)."""
    for name in names:
        key, value = f"{section}.{name}", getattr(config, name)
        ok = 0.0 <= value < 1.0  # false for NaN too
        require(ok, f"{key}={value}", "must be at least 0 and below 1", "use for example 0.1", key)
