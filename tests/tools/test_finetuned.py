"""Mean and spread over the seeds of fine-tuned runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from megagpt.finetune.result import is_best, write_result

ROOT = Path(__file__).parents[2]


def write(run: Path, seed: int, score: float, weights: bool = True) -> str:
    run.mkdir()
    about = {"task": "SST-2", "base": "runs/a", "weights": weights, "seed": seed}
    write_result(run, 10, score, {"accuracy": score}, about)
    return str(run)


def called(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "finetuned.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "COLUMNS": "160"})


def test_mean_and_spread(tmp_path):
    runs = [write(tmp_path / str(seed), seed, score) for seed, score in ((1, 0.8), (2, 0.82), (3, 0.84))]
    runs.append(write(tmp_path / "scratch", 1, 0.7, weights=False))
    done = called(*runs, "--json", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    assert "0.8200" in done.stdout and "0.0200" in done.stdout and "0.7000" in done.stdout
    first, second = json.loads((tmp_path / "out.json").read_text())
    assert first["seeds"] == [1, 2, 3] and first["base"] == "runs/a" and second["base"] is None
    assert second["spread"] is None


def test_a_run_without_a_result_is_told(tmp_path):
    done = called(str(tmp_path))
    assert done.returncode == 2 and "has no result.json; give the folders of runs" in done.stderr


def test_the_best_step_is_the_first_of_the_highest_score(tmp_path):
    write(tmp_path / "run", 1, 0.8)
    run = tmp_path / "run"
    assert not is_best(run, 20, 0.8) and is_best(run, 20, 0.81)
    assert is_best(run, 10, 0.5) and is_best(run, 5, 0.5)  # done again after a crash
