"""The proofs of tests/ops/proof.py on a device, without pytest: what `make gpu-check` runs, an op a process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.kernels import first_line
from megagpt.ops.dropout import dropout
from megagpt.ops.library import DTYPES, MISSING_KERNELS, has_kernel
from tests.ops import proof
from tests.ops.case import Case, Spec

Check = Callable[[Case, torch.dtype, str], None]


def prove(op: str, device: str, quick: bool) -> dict[str, Any]:
    """How many checks of an op passed, which failed and why, and the branches that its kernels took.

    After a failure it goes on, unless the device was lost with it.
    """
    if MISSING_KERNELS:
        raise RuntimeError(f"no compiled kernels: {MISSING_KERNELS}")
    torch.set_num_threads(1)  # the cases are small, and other ops are proven at the same time
    spec: Spec = importlib.import_module(f"tests.ops.cases.{op}").SPEC
    passed, failures = 0, []
    for check, case, dtype in checks(spec, device, quick):
        try:
            check(case, dtype, device)
            passed += 1
        except Exception as error:  # whatever it is, it is listed, and the check counts as failed
            name = f"{check.__name__}, {case.name}, {str(dtype).removeprefix('torch.')}"
            failures.append({"check": name, "message": f"{type(error).__name__}: {error}"[:1000]})
            if lost := device_lost(device):
                failures.append({"check": "all that follow", "message": f"not run, the GPU gave up: {lost}"})
                break
    branches = [] if failures and device_lost(device) else torch.ops.megagpt.branches_reached()
    return {"passed": passed, "failed": failures, "branches": branches}


def checks(spec: Spec, device: str, quick: bool) -> Iterator[tuple[Check, Case, torch.dtype]]:
    """Those of tests/ops/test_every_op.py; quick: only that the values are right."""
    for dtype in DTYPES[device]:
        for case in spec.cases:
            yield proof.check_values, case, dtype
    if quick:
        return
    for case in spec.cases:
        yield proof.check_non_contiguous, case, torch.float32
        if not case.nan:
            yield proof.check_registration, case, torch.float32
    yield proof.check_compiles, spec.cases[-1], torch.float32


def device_lost(device: str) -> str:
    """Why a GPU takes no more work in this process (an address that is not its own, say); "" if it does."""
    if device != "cuda":
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return first_line(error)
    return ""


def dropout_masks(device: str) -> dict[str, Any]:
    """Whether the masks of both kernels are equal to the bit: whole samples, and a part that begins anywhere."""
    if device != "cuda" or not (has_kernel("dropout", "cpu") and has_kernel("dropout", "cuda")):
        return {"skipped": "needs the kernels of both the CPU and the GPU"}
    x = torch.ones(8, 1024 * 768 + 3)
    ids = torch.tensor([0, 1, 2, 3, 1000, 2**31, 2**32 + 5, 2**62])
    differing = 0
    for offset in (0, 1, 4093):
        cpu = dropout(x, ids, p=0.1, seed=1234, site=7, offset=offset)
        gpu = dropout(x.cuda(), ids.cuda(), p=0.1, seed=1234, site=7, offset=offset)
        differing += int((cpu != gpu.cpu()).sum())
    return {"elements": 3 * x.numel(), "differing": differing}
