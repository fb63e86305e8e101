"""Without a compiled library that loads and fits the GPU the references run, and the status says why."""

from __future__ import annotations

import importlib.machinery
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megagpt
from megagpt.ops import library
from megagpt.ops.softcap import softcap
from tests.ops.case import all_specs

PROGRAM = """
import json, torch, megagpt
from megagpt.ops.library import kernel_status
from megagpt.ops.softcap import softcap
y = softcap(torch.arange(1.0, 31.0), 5.0)
print(json.dumps([megagpt.__file__, *kernel_status("softcap", "cpu"), y.tolist()]))
"""


@pytest.mark.parametrize("build", ["missing", "broken"])
def test_reference_runs_and_the_status_says_why(tmp_path, build):
    source = Path(megagpt.__file__).parent
    shutil.copytree(source, tmp_path / "megagpt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    name = f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if build == "broken":
        (tmp_path / "megagpt" / name).write_bytes(b"not a library")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    file, what, why, values = json.loads(run.stdout)
    assert Path(file).is_relative_to(tmp_path)
    wanted = {"missing": "not built", "broken": f"{name} does not load with torch"}[build]
    assert what == "reference" and why.startswith(wanted) and "make build" in why
    assert values == softcap(torch.arange(1.0, 31.0), 5.0, kernels="reference").tolist()


@pytest.mark.parametrize(
    ("compiled", "capability", "wanted"),
    [
        (["sm_80", "sm_90", "compute_90"], (8, 0), True),
        (["sm_80", "sm_90", "compute_90"], (8, 9), True),  # later within 8
        (["sm_80", "sm_90", "compute_90"], (9, 0), True),
        (["sm_80", "sm_90", "compute_90"], (12, 0), True),  # by PTX
        (["sm_80", "sm_90", "compute_90"], (7, 0), False),
        (["sm_80", "sm_90", "compute_90"], (7, 5), False),
        (["sm_80", "sm_90"], (10, 0), False),  # no PTX
        (["sm_86"], (8, 0), False),
        (["sm_86"], (8, 9), True),
        (["compute_70"], (9, 0), True),
        (["sm_90a"], (9, 0), True),
        (["compute_90a"], (10, 0), False),  # bound to 9.0
        (["sm_100"], (10, 3), True),
        (["sm_120"], (10, 0), False),
        ([], (9, 0), False),
    ],
)
def test_which_gpus_a_build_supports(compiled, capability, wanted):
    assert library.supports(compiled, capability) is wanted


def test_a_gpu_that_the_build_does_not_cover_runs_the_reference_and_says_so_once(monkeypatch):
    monkeypatch.setattr(library, "UNUSABLE", {})
    monkeypatch.setattr(library, "KERNELS", {("softcap", "cuda"), ("softcap", "cpu")})
    monkeypatch.setattr(library, "MISSING_KERNELS", None)
    library.check_gpus(["sm_80", "sm_90", "compute_90"], [(8, 0), (9, 0)])
    assert library.kernel_status("softcap", "cuda") == ("cuda kernel", "built")
    with pytest.warns(UserWarning, match="PyTorch reference code does") as said:
        library.check_gpus(["sm_80", "sm_90", "compute_90"], [(7, 0), (9, 0), (7, 0)])
    assert len(said) == 1
    what, why = library.kernel_status("softcap", "cuda")
    assert what == "reference" and "a GPU here is 7.0" in why and 'TORCH_CUDA_ARCH_LIST="7.0" make build' in why
    assert not library.runs_kernel("softcap", FakeCuda(), "auto")  # pyright: ignore[reportArgumentType]
    with pytest.raises(RuntimeError, match=r"a GPU here is 7\.0"):
        library.runs_kernel("softcap", FakeCuda(), "cuda")  # pyright: ignore[reportArgumentType]
    assert library.has_kernel("softcap", "cpu")


class FakeCuda:
    """What runs_kernel looks at of a tensor on a GPU."""

    device = torch.device("cuda", 0)
    dtype = torch.float32


@pytest.mark.skipif(library.MISSING_KERNELS is not None, reason=f"no compiled kernels: {library.MISSING_KERNELS}")
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_the_library_needs_of_torch_its_stable_abi_only():
    """C functions alone: a C++ one of torch would bind the build to the torch that it was built with."""
    (built,) = Path(megagpt.__file__).parent.glob("_C*.so")
    listed = subprocess.run(["nm", "-DuC", built], capture_output=True, text=True, check=True).stdout
    names = [line.split(maxsplit=1)[1] for line in listed.splitlines()]
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in names)
    bound = [name for name in names if re.search(r"\b(c10|at|torch|caffe2)::", name) or name.startswith("Py")]
    assert not bound


def test_an_op_goes_by_the_name_of_its_files():
    """Else the start-up table, and a check of --kernels, look for a kernel that is there and do not find it."""
    assert library.op_names() == [spec.op for spec in all_specs() if spec.branches]
    assert [op for op in library.op_names() if not hasattr(torch.ops.megagpt, op)] == []
