"""Which implementation each op of a run takes, and why: checked before the start, shown at the start."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Sequence
from typing import NamedTuple

from megagpt.config.kernels import Kernels
from megagpt.errors import UserError
from megagpt.ops.library import has_kernel, kernel_status
from tests.ops import cases


class Status(NamedTuple):
    """One line of the start-up table."""

    op: str
    runs: str
    why: str


def check_kernels(kernels: Kernels, ops: Sequence[str], device: str) -> None:
    """Raise UserError for an op that does not exist, or a kernel of one of `ops` that is insisted on and not there."""
    names = ["attention", *(module.name for module in pkgutil.iter_modules(cases.__path__))]
    for op, _ in kernels.exceptions:
        if op not in names:
            near = difflib.get_close_matches(op, names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(names))}"
            raise UserError(f"train.kernels names the op {op}, which does not exist; {hint}")
    if kernels["attention"] == "flex" and device == "cpu":
        raise UserError(
            "train.kernels has attention=flex, but torch's FlexAttention cannot train on the cpu (it has no backward "
            "pass there); use attention=auto"
        )
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
    """A row for each of `ops`."""
    return [Status(op, *kernel_status(op, device, kernels[op])) for op in ops]
