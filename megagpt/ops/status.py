"""Which implementation each op of a run takes, and why: checked before the start, shown at the start."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Sequence
from typing import NamedTuple

from megagpt.errors import UserError
from megagpt.kernels import Kernels
from megagpt.ops import cases
from megagpt.ops.library import has_kernel, kernel_status


class Status(NamedTuple):
    """One line of the start-up table."""

    op: str
    runs: str
    why: str


def check_kernels(kernels: Kernels, ops: Sequence[str], device: str) -> None:
    """Raise UserError for an op that does not exist, or a kernel of one of `ops` that is insisted on and not there."""
    names = [module.name for module in pkgutil.iter_modules(cases.__path__)]
    for op, _ in kernels.exceptions:
        if op not in names:
            near = difflib.get_close_matches(op, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names))}"
            raise UserError(f"train.kernels names the op {op}, which does not exist; {hint}")
    for op in ops:
        choice = kernels[op]
        if choice not in ("cpu", "cuda"):
            continue
        if choice != device:
            raise UserError(f"train.kernels={choice} for {op}, but this run is on the {device}; use auto or {device}")
        if not has_kernel(op, device):
            _, why = kernel_status(op, device, choice)
            raise UserError(f"train.kernels={choice} for {op}: {why}; or use --kernels auto")


def kernel_rows(kernels: Kernels, ops: Sequence[str], device: str) -> list[Status]:
    """A row for each of `ops`; one for attention where torch's takes the place of softmax."""
    rows = [Status(op, *kernel_status(op, device, kernels[op])) for op in ops]
    if "softmax" not in ops:
        rows.append(Status("attention", "torch's scaled_dot_product_attention", "no dropout or ALiBi in it"))
    return rows
