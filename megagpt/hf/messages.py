"""Messages that more than one file of this folder gives."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from megagpt.errors import UserError


def require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Raises UserError naming both shapes."""
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, wanted {shape}; check the model configuration")


def few(names: Iterable[str]) -> str:
    """The first names, for a message of one line."""
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
