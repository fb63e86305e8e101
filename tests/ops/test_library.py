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
from megagpt.ops.dropout import dropout

PROGRAM = """
import json, torch, megagpt
from megagpt.ops.dropout import dropout
from megagpt.ops.library import kernel_status
y = dropout(torch.arange(1.0, 31.0).view(2, 15), torch.tensor([5, 6]), p=0.3, seed=1, site=2, offset=3)
print(json.dumps([megagpt.__file__, kernel_status("dropout", "cpu"), y.tolist()]))
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
    file, status, values = json.loads(run.stdout)
    assert Path(file).is_relative_to(tmp_path)
    wanted = {"missing": "reference (not built", "broken": f"reference ({name} does not load with torch"}[library]
    assert status.startswith(wanted) and "make build" in status
    x, ids = torch.arange(1.0, 31.0).view(2, 15), torch.tensor([5, 6])
    assert values == dropout(x, ids, p=0.3, seed=1, site=2, offset=3).tolist()
