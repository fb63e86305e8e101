"""The `megagpt::` operator library: loads the compiled kernels, or says why the references run instead.

An op's schema is defined in its own Python file, not in C++, so that every op exists without a compiler: the
compiled library only adds faster kernels for a device (`TORCH_LIBRARY_IMPL`), and the dispatcher takes them by itself.
"""

from __future__ import annotations

import importlib.machinery
from pathlib import Path

import torch

LIBRARY = torch.library.Library("megagpt", "DEF")


def _load_kernels() -> str | None:
    """Load csrc's kernels; returns None, or the reason why there are none."""
    folder = Path(__file__).parents[1]
    found = [p for s in importlib.machinery.EXTENSION_SUFFIXES if (p := folder / f"_C{s}").exists()]
    if not found:
        return "not built: run `make build` (needs a C++ compiler)"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{found[0].name} does not load with torch {torch.__version__} ({str(error)[:120]}): run `make build`"
    return None


MISSING_KERNELS = _load_kernels()


def kernel_status(op: str, device: str) -> str:
    """Which implementation `op` runs on `device` ("cpu" or "cuda"), and why: for the start-up table."""
    key = {"cpu": "CPU", "cuda": "CUDA"}[device]
    if torch._C._dispatch_has_kernel_for_dispatch_key(f"megagpt::{op}", key):
        return f"{device} kernel"
    return f"reference ({MISSING_KERNELS or f'no {key} kernel in this build'})"
