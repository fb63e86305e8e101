"""The `megagpt::` operator library: declares ops, loads the compiled kernels, and says which implementation runs.

An op's schema is defined in its own Python file, not in C++, so that every op exists without a compiler: the compiled
library only adds kernels for a device. Where there is none, the public function runs its plain PyTorch reference.
"""

from __future__ import annotations

import importlib.machinery
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = torch.library.Library("megagpt", "DEF")
KERNELS: set[tuple[str, str]] = set()  # (op, device) of what is compiled; filled while ops are declared

# Element types that kernels are written for.
DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


def define(schema: str, fake: Callable) -> None:
    """Declare an op, e.g. "softcap(Tensor x, float cap) -> Tensor"; `fake` makes its results without computing."""
    LIBRARY.define(schema)
    op = schema.partition("(")[0]
    torch.library.register_fake(f"megagpt::{op}", fake, lib=LIBRARY)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    KERNELS.update((op, device) for device in DTYPES if has(f"megagpt::{op}", device.upper()))


def differentiable(op: str, save: Callable, backward: Callable) -> None:
    """Give an op its gradient: save(ctx, inputs, output), backward(ctx, *grads) -> a gradient or None per input."""
    torch.library.register_autograd(f"megagpt::{op}", backward, setup_context=save, lib=LIBRARY)


def has_kernel(op: str, device: str) -> bool:
    """Whether the compiled library holds a kernel of `op` for "cpu" or "cuda"."""
    return (op, device) in KERNELS


def runs_kernel(op: str, x: Tensor, choice: str = "auto") -> bool:
    """Whether `op` on x runs its kernel (True) or its reference (False).

    choice: "auto" takes the kernel where there is one, "reference" never does, "cpu" and "cuda" insist on it.
    Raises RuntimeError where it insists and there is none.
    """
    if choice == "reference":
        return False
    device = x.device.type
    if x.dtype in KERNEL_DTYPES.get(device, ()) and has_kernel(op, device):
        if choice in ("auto", device):
            return True
        raise RuntimeError(f"kernels={choice} for {op}, but its input is on the {device}; use {device} or auto")
    if choice == "auto":
        return False
    why = MISSING_KERNELS or f"no kernel for {x.dtype} on {device}"
    raise RuntimeError(f"kernels={choice} for {op}, which has none: {why}; or use kernels=auto")


def kernel_status(op: str, device: str, choice: str = "auto") -> tuple[str, str]:
    """Which implementation `op` runs on `device`, and why: for the start-up table."""
    if choice == "reference":
        return "reference", "asked for"
    if has_kernel(op, device):
        return f"{device} kernel", "asked for" if choice == device else "built"
    return "reference", MISSING_KERNELS or f"this build has no {device} kernel of it"


def _load_kernels() -> str | None:
    """Load csrc's kernels; returns None, or the reason why there are none."""
    if EMULATED_CUDA:
        torch.ops.load_library(EMULATED_CUDA)
        return None
    folder = Path(__file__).parents[1]
    found = [p for s in importlib.machinery.EXTENSION_SUFFIXES if (p := folder / f"_C{s}").exists()]
    if not found:
        return "not built: run `make build` (needs a C++ compiler)"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{found[0].name} does not load with torch {torch.__version__} ({str(error)[:120]}): run `make build`"
    return None


# For tests: a library of the CUDA kernels built for the CPU (tests/ops/test_cuda.py), loaded in place of ours.
EMULATED_CUDA = os.environ.get("MEGAGPT_EMULATED_CUDA")
KERNEL_DTYPES = {"cpu": DTYPES["cuda"]} if EMULATED_CUDA else DTYPES
define("branches_reached() -> str[]", lambda: [])
MISSING_KERNELS = _load_kernels()
