"""Without the compiled library, or with one that does not load, the references run and the status says why."""

from __future__ import annotations

import importlib.machinery
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import megagpt
from megagpt.ops.softcap import softcap

PROGRAM = """
import json, torch, megagpt
from megagpt.ops.library import kernel_status
from megagpt.ops.softcap import softcap
y = softcap(torch.arange(1.0, 31.0), 5.0)
print(json.dumps([megagpt.__file__, *kernel_status("softcap", "cpu"), y.tolist()]))
"""


@pytest.mark.parametrize("library", ["missing", "broken"])
def test_reference_runs_and_the_status_says_why(tmp_path, library):
    source = Path(megagpt.__file__).parent
    shutil.copytree(source, tmp_path / "megagpt", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    name = f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    if library == "broken":
        (tmp_path / "megagpt" / name).write_bytes(b"not a library")
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True
    )
    file, what, why, values = json.loads(run.stdout)
    assert Path(file).is_relative_to(tmp_path)
    wanted = {"missing": "not built", "broken": f"{name} does not load with torch"}[library]
    assert what == "reference" and why.startswith(wanted) and "make build" in why
    assert values == softcap(torch.arange(1.0, 31.0), 5.0, kernels="reference").tolist()
