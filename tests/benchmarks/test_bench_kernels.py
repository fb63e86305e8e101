"""`make bench-kernels` times every implementation, apart from each other, and writes every figure; no speed is held."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import kernels
from benchmarks.kernels_shown import plot
from megagpt.errors import UserError
from megagpt.ops.library import MISSING_KERNELS
from tests.ops.case import Shape, Spec

REPOSITORY = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(MISSING_KERNELS is not None, reason=f"no compiled kernels: {MISSING_KERNELS}")


def bench(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.kernels", "--device", "cpu", *flags]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@needs_kernels
@pytest.mark.slow
def test_the_benchmark_measures_an_op_and_writes_its_figures(tmp_path: Path):
    figures, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    shown = bench("softcap", "--first", "--seconds", "0", "--json", str(figures), "--plot", str(picture))
    assert shown.returncode == 0, shown.stderr
    assert "softcap: " in shown.stdout and "a copy: " in shown.stdout

    written = json.loads(figures.read_text())
    assert {"command", "machine", "versions", "device", "ops"} <= written.keys()
    (op,) = written["ops"]
    assert op["op"] == "softcap" and op["copy_gb_per_s"].keys() == {"before", "after"}
    assert [row["dtype"] for row in op["rows"]] == ["fp32", "bf16"]
    for row in op["rows"]:
        assert row["failed"] == {}
        for which in kernels.PASSES:
            found = row[which]["implementations"]
            assert found.keys() == {"kernel", "eager", "compile"}
            for name, summary in found.items():
                assert 0 < summary["min_s"] <= summary["median_s"]
                assert summary["rounds"] == kernels.MIN_ROUNDS
                assert summary["gb_per_s"] * 1e9 == pytest.approx(row[which]["bytes"] / summary["median_s"])
                assert summary["share_of_copy"] > 0
                assert ("time_over_ours" in summary) == (name != "kernel")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_unknown_op_is_one_line_with_the_names_there_are():
    with pytest.raises(UserError, match=r"^no op is called no_such_op; there are .*softcap"):
        kernels.choose(["no_such_op"])


def sleepy(x: torch.Tensor, kernels: str = "auto") -> torch.Tensor:
    """Ours takes 1 ms, the reference 10 ms and overwrites what it is given."""
    time.sleep(0.010 if kernels == "reference" else 0.001)
    return x.mul_(2.0) if kernels == "reference" else x * 2.0


def refuse():
    raise ImportError("No module named 'peer'")


def broken():
    def call(x):
        raise ValueError("wanted another shape\nand so on")

    return call


def measure_sleepy(monkeypatch: pytest.MonkeyPatch, **peers) -> kernels.Measured:
    monkeypatch.setitem(kernels.COPY_BYTES, "cpu", 1 << 20)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    shape = Shape("4 x 4", lambda draw: {"x": draw.normal(4, 4)}, lambda arguments: 128, lambda arguments: 128)
    spec = Spec("sleepy", sleepy, cases=(), shapes=(shape,), peers=peers)
    return kernels.measure_op(spec, kernels.Clock("cpu"), ("fp32",), seconds=0)


def test_times_ratios_and_bandwidths_are_those_of_each_implementation(monkeypatch: pytest.MonkeyPatch):
    (row,) = measure_sleepy(monkeypatch).rows
    forward = row["forward"]["implementations"]
    assert forward["eager"]["min_s"] >= 0.010 > forward["kernel"]["min_s"] >= 0.001
    assert forward["eager"]["time_over_ours"] > 2
    assert row["backward"]["implementations"]["eager"]["min_s"] < 0.010  # what the forward pass took is not in it


def test_inputs_stay_as_they_are_where_an_implementation_overwrites_them():
    x = torch.ones(3, requires_grad=True)
    taken = kernels.time_once(lambda x: sleepy(x, kernels="reference"), {"x": x}, kernels.Clock("cpu"))
    assert len(taken) == 2 and x.tolist() == [1.0, 1.0, 1.0]


def test_what_is_missing_and_what_fails_is_named_and_the_rest_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    measured = measure_sleepy(monkeypatch, absent=refuse, broken=broken)
    assert measured.not_installed == {"absent": "ImportError: No module named 'peer'"}
    (row,) = measured.rows
    assert row["failed"] == {"broken": "ValueError: wanted another shape"}
    assert row["forward"]["implementations"].keys() == {"kernel", "eager", "compile"}
    machine = {"cpu": "a CPU", "threads": 1}
    plot({"ops": [measured.as_json()], "machine": machine}, tmp_path / "a.svg")
    assert "sleepy: 4 x 4, fp32" in (tmp_path / "a.svg").read_text()
