"""`make gpu-check` end to end on the CPU: the same code, a smaller model; and what becomes of a part that fails."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_bench, gpu_check, gpu_prove, gpu_train, kernels
from megagpt.ops.library import MISSING_KERNELS
from tests.ops.case import Case, Shape, Spec, all_specs

REPOSITORY = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(MISSING_KERNELS is not None, reason=f"no compiled kernels: {MISSING_KERNELS}")


def check(*flags: str) -> subprocess.CompletedProcess:
    # passive: on a busy machine, threads that spin while they wait take minutes for this
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "benchmarks.gpu_check", *flags]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


@needs_kernels
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_every_part_runs_and_writes_its_figures(tmp_path: Path):
    file = tmp_path / "figures.json"
    flags = ["--device", "cpu", "--quick", "--preset", "tiny", "--steps", "3", "--batch", "1", "--ops", "softcap"]
    shown = check(*flags, "--json", str(file))
    assert shown.returncode == 0, shown.stdout + shown.stderr

    written = json.loads(file.read_text())
    assert {"command", "machine", "versions", "parts"} == written.keys()
    parts = written["parts"]
    assert list(parts) == ["build", "prove", "bench", "train"]
    assert all(part["ok"] and part["took_s"] > 0 and part["command"] for part in parts.values())
    (softcap,) = (spec for spec in all_specs() if spec.op == "softcap")
    assert (parts["prove"]["passed"], parts["prove"]["failed"]) == (3 * len(softcap.cases), 0)
    assert parts["prove"]["branches_taken"] >= 1 and parts["prove"]["branches_missed"] == []
    (op,) = parts["bench"]["ops"]
    assert op["op"] == "softcap" and op["rows"][0]["forward"]["implementations"].keys() >= {"kernel", "eager"}
    assert len(parts["bench"]["goals"]) == 4
    ours, plain = parts["train"]["runs"]
    assert (ours["kernels"], plain["kernels"]) == ("auto", "reference,softmax=auto")
    for run in (ours, plain):
        assert run["tokens_per_s"] > 0 and run["steps"] == 3 and run["mfu"] is None
    assert plain["losses"] == pytest.approx(ours["losses"], rel=0.02)  # bf16


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line():
    shown = check()
    assert shown.returncode == 2 and shown.stdout == ""
    (line,) = shown.stderr.splitlines()
    assert line.startswith("error: no GPU was found") and "--device cpu --quick" in line


def test_an_unknown_op_is_named():
    shown = check("--device", "cpu", "--ops", "softcap,nothing")
    assert shown.returncode == 2 and "nothing is not known; there are " in shown.stderr


def fail() -> None:
    raise ValueError("a reason")


def die() -> None:
    os._exit(7)


def hang() -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("function", "message"),
    [("fail", "ValueError: a reason"), ("die", "the process died with exit code 7"), ("hang", "no answer after")],
)
def test_a_process_that_fails_dies_or_hangs_is_an_error_of_its_own(monkeypatch, function: str, message: str):
    monkeypatch.setitem(gpu_check.TIME_LIMIT_S, "prove", 30 if function != "hang" else 1)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    with pytest.raises(gpu_check.WorkerError, match=message):
        gpu_check.in_process("prove", Path(__file__).stem, function)


def test_a_failed_part_stops_none_that_follows(monkeypatch, tmp_path: Path):
    def part(ok: bool):
        def run(args) -> dict:
            if not ok:
                raise RuntimeError("no luck")
            return {"ok": True}

        return run

    file = tmp_path / "figures.json"
    monkeypatch.setattr(gpu_check, "PARTS", {"a": (part(False), ""), "b": (part(True), "")})
    monkeypatch.setattr(gpu_check, "use_device", lambda device: None)

    def call(parts: str) -> int:
        monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--parts", parts, "--json", str(file)])
        return gpu_check.main()

    assert call("a,b") == 1
    parts = json.loads(file.read_text())["parts"]
    assert (parts["a"]["ok"], parts["a"]["error"], parts["b"]["ok"]) == (False, "RuntimeError: no luck", True)
    monkeypatch.setitem(gpu_check.PARTS, "a", (part(True), ""))
    assert call("a") == 0  # and b, of the call before, stays
    parts = json.loads(file.read_text())["parts"]
    assert parts["a"]["ok"] and parts["b"]["ok"]


def test_figures_of_another_machine_are_not_kept(tmp_path: Path):
    file = tmp_path / "figures.json"
    here = {"command": "c", "machine": {"gpu": "A", "load_average": 1}, "versions": {"torch": "1"}}
    gpu_check.Figures(file, here).write("build", {"ok": True})
    assert gpu_check.Figures(file, here | {"machine": {"gpu": "A", "load_average": 2}}).parts.keys() == {"build"}
    assert gpu_check.Figures(file, here | {"machine": {"gpu": "B", "load_average": 1}}).parts == {}


def double(x: torch.Tensor, kernels: str = "auto") -> torch.Tensor:
    """Right in the reference alone."""
    return x * 2 if kernels == "reference" else x * 2.1


def spec_of(call) -> Spec:
    shape = Shape("4 x 4", lambda draw: {"x": draw.normal(4, 4)}, lambda arguments: 128, lambda arguments: 128)
    cases = (
        Case("one", call, lambda draw: {"x": draw.normal(1)}),
        Case("two", call, lambda draw: {"x": draw.normal(2)}),
    )
    return Spec("double", call, cases=cases, shapes=(shape,))


@needs_kernels
def test_each_wrong_result_is_counted_and_listed(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: type("Module", (), {"SPEC": spec_of(double)}))
    result = gpu_prove.prove("double", "cpu", quick=True)
    assert result["passed"] == 0 and len(result["failed"]) == 6  # two cases in three number formats
    assert result["failed"][0]["check"] == "check_values, one, float64"
    assert result["failed"][0]["message"].startswith("AssertionError: one: result 0: 1 of 1 elements are wrong")


def row(op: str, **shares: float) -> kernels.Measured:
    """A row whose kernel has these shares of copy bandwidth, of 1 GB/s; torch.compile takes 0.9 of its time."""
    both = {
        which: {
            "implementations": {"kernel": {"share_of_copy": share, "median_s": 1.0}, "compile": {"time_over_ours": 0.9}}
        }
        for which, share in shares.items()
    }
    return kernels.Measured(op, [{"shape": "s", "input_bytes": 600_000_000, **both}], {"before": 1.0, "after": 1.0}, {})


def test_goals_are_held():
    met = {goal["goal"]: goal["met"] for goal in gpu_bench.goals(row("softcap", forward=0.86, backward=0.74))}
    assert met == {
        "forward, share of copy bandwidth": True,
        "forward, torch.compile's time over ours": False,
        "backward, share of copy bandwidth": False,
        "backward, torch.compile's time over ours": False,
    }
    bound, *_ = gpu_bench.goals(row("cross_entropy", forward=0.1, backward=0.1))
    assert bound["got"] == pytest.approx(2 / 1.2, abs=1e-3) and not bound["met"]


@pytest.mark.slow
def test_the_loop_without_deepspeed_does_what_the_engine_does(monkeypatch):
    settings = ("tiny", "cpu", 6, 1, 0.0, "auto")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    engine = gpu_check.in_process("train", "benchmarks.gpu_train", "train", *settings)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    plain = gpu_train.train(*settings)
    assert (engine["trained_by"], plain["trained_by"]) == ("engine", "plain PyTorch loop")
    assert plain["losses"] == pytest.approx(engine["losses"], rel=0.02)  # bf16


def test_setup_leaves_out_what_needs_a_missing_package(tmp_path: Path):
    program = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['pybind11'] = None; "
        "sys.argv = ['setup.py', 'build_ext', '--inplace']; runpy.run_path('setup.py', run_name='__main__')"
    )
    (tmp_path / "setup.py").write_text((REPOSITORY / "setup.py").read_text())
    environment = {k: v for k, v in os.environ.items() if k != "MEGAGPT_REQUIRE_EXT"}
    command = [sys.executable, "-c", program]
    built = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert "_normal not built: pybind11 is not importable" in built.stderr
    assert "_C not built: torch is not importable" in built.stderr
