"""`make bench-train` runs, does the same step on both sides, and writes every figure; nothing about its speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "train.py"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_benchmark_trains_both_and_writes_its_figures(tmp_path):
    figures = tmp_path / "figures.json"
    flags = ["--shapes", "smoke", "--precisions", "fp32", "--dropouts", "0", "--layouts", "one", "pp2", "--rounds", "2"]
    # passive: on a busy machine, threads that spin while they wait take minutes for this
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parents[1]), "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, str(PROGRAM), *flags, "--json", str(figures)]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "one process" in shown.stdout and "pp=2" in shown.stdout

    written = json.loads(figures.read_text())
    assert {"command", "machine", "versions", "rounds", "rows"} <= written.keys()
    one, pp2 = written["rows"]
    assert (one["layout"], one["processes"], pp2["layout"], pp2["processes"]) == ("one process", 1, "pp=2", 2)
    for row in (one, pp2):
        assert row["ours"]["tokens_per_s"] > 0
        assert len(row["ours"]["step_times_s"]) == written["rounds"] == 2
        assert row["peers"].keys() == {"kernels off", "fp32"}
        for peer in row["peers"].values():
            assert peer["loss_difference"] < 1e-5  # the same weights, tokens, loss, clipping and optimizer
            assert peer["ours_over_peer"].keys() == {"median", "low", "high"}
        assert len(row["peak_mib"]) == len(row["plan_mib"]) == row["processes"]
        assert all(0 < peak < 5 for peak in row["peak_mib"])
    assert one["peers"]["fp32"]["peak_mib"] > 0
