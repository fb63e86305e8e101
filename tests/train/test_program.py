"""The program as a user runs it: three launchers, what stands on the screen, what is left, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pytest

from megagpt.cli import parse_run_config
from megagpt.data.opened import with_text
from megagpt.errors import UserError
from megagpt.train.pretrain import ranks_to_start

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROGRAM = str(ROOT / "examples" / "pretrain_gpt.py")
pytestmark = pytest.mark.timeout(300)  # a start of four ranks on a busy machine takes minutes
SMALL = "--n-layers 2 --d-model 32 --seq-len 32 --global-batch-size 8 --micro-batch-size 2 --eval-steps 1"
SCHEDULE = "--warmup-steps 1 --optim.decay-steps 6 --lr 0.01 --model.dropout-residual 0.1"
# What DeepSpeed's and torch's launchers write about themselves, before our program begins and after it ended.
LAUNCHERS_OWN = re.compile(r"\[20\d\d-.*\] \[(INFO|WARNING)\] \[(runner|launch|real_accelerator)\.py")

TIME = re.compile(r"^20\d\d-\d\d-\d\d \d\d:\d\d:\d\d ")


@dataclass(frozen=True)
class Run:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What our program wrote on stdout, without the times."""
        return [TIME.sub("", line.rstrip()) for line in self.out.splitlines() if not LAUNCHERS_OWN.match(line)]

    def refused(self, *words: str) -> None:
        """Exit code 2 and one line on stderr that holds all the words."""
        assert self.code == 2, self
        assert re.fullmatch(r"error: [^\n]+\n", self.err), self.err
        for word in words:
            assert word in self.err, f"{word!r} is not in {self.err!r}"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Where the default corpus is kept: made by the first run, found by the others."""
    return tmp_path_factory.mktemp("cache")


def run(cache: Path, *command: str, timeout_s: float = 280.0) -> Run:
    """Run a command line, split at spaces, and end all that it started if it takes too long."""
    words = [word for part in command for word in part.split()]
    launcher = [str(BIN / words[0]), PROGRAM] if words[0] != "torchrun" else [str(BIN / "torchrun")]
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["MPLCONFIGDIR"] = matplotlib.get_cachedir()  # not in the new cache: making its list of fonts takes seconds
    env.pop("DS_ACCELERATOR", None)
    with subprocess.Popen(
        [*launcher, *words[1:]],
        env=env,
        cwd=cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise AssertionError(f"no end after {timeout_s} s: {process.communicate()}") from None
    return Run(process.returncode, out, err)


def rows(folder: Path) -> tuple[list[dict], list[dict]]:
    """Steps and validations of a run's metrics.jsonl."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [r for r in found if "loss" in r], [r for r in found if "validation_loss" in r]


@pytest.fixture(scope="module")
def first(cache) -> tuple[Run, Path]:
    """The issue's command, shortened: four steps of a small model on the default corpus."""
    folder = cache / "first"
    options = f"--tp 2 --pp 2 --train-steps 4 --eval-interval 2 --save {folder} {SMALL} {SCHEDULE}"
    return run(cache, "deepspeed", options), folder


def test_deepspeed_starts_the_ranks_that_the_layout_needs(first, cache):
    result, folder = first
    assert (result.code, result.err) == (0, ""), result
    lines = result.lines
    assert lines[0].startswith("preparing the default corpus, once: ")
    assert lines[1] == "no GPU here: starting 4 processes on the CPU (gloo), as this layout needs"
    assert lines[2].startswith("configuration")
    started = result.out.index(lines[1])
    launcher = [line for line in result.out[started:].splitlines() if LAUNCHERS_OWN.match(line)]
    assert len(launcher) <= 1, launcher  # the outer one says that it ended
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == len(set(steps)), steps  # one rank speaks
    assert sum(line.startswith("step 4/4 | loss ") for line in lines) == 1
    assert sum(line.startswith("optimizer: torch AdamW") for line in lines) == 1
    assert lines[-1] == f"run folder: {folder} (loss curve: {folder / 'loss.png'})"
    chatter = re.compile("warning|traceback|deprecated|MA 0|deepspeed", re.IGNORECASE)
    assert not [line for line in lines if chatter.search(line)]
    assert (cache / "megagpt").is_dir()


def test_a_run_folder_holds_what_is_promised(first):
    _, folder = first
    steps, validations = rows(folder)
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["step"] for row in validations] == [2, 4]
    assert steps[-1]["tokens"] == 4 * 8 * 32
    assert steps[0].keys() >= {"loss", "lr", "grad_norm", "step_time_s"}
    assert steps[-1].keys() >= {"tokens_per_s", "tflops_per_process"}
    assert validations[-1].keys() >= {"perplexity", "bits_per_byte"}
    assert validations[-1]["validation_loss"] < 8.3 < validations[-1]["perplexity"]  # ln 4096 = 8.32
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((folder / "tensorboard").iterdir())
    assert "tp: 2" in (folder / "config.yaml").read_text()
    assert (folder / "checkpoints" / "latest").read_text().startswith("step-000004 ")


def test_resumed_elsewhere_it_is_the_run_of_one_process(first, cache):
    """4 ranks for 4 steps, then 2 ranks of torchrun for 2: the losses of one plain process for 6."""
    _, folder = first
    one = run(cache, "python", f"--train-steps 6 --eval-interval 2 --save whole {SMALL} {SCHEDULE}")
    assert (one.code, one.err) == (0, "")
    assert not any("preparing" in line or "starting" in line for line in one.lines)
    resumed = run(
        cache, f"torchrun {PROGRAM} --tp 2 --train-steps 6 --eval-interval 2 --load {folder} {SMALL} {SCHEDULE}"
    )
    assert (resumed.code, resumed.err) == (0, ""), resumed
    assert f"going on from {folder / 'checkpoints' / 'step-000004'} after 4 steps" in resumed.lines
    (steps, validations), (expected, expected_validations) = rows(folder), rows(cache / "whole")
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    for key in ("loss", "grad_norm", "lr"):
        assert [r[key] for r in steps] == pytest.approx([r[key] for r in expected], rel=1e-5)
    for key in ("validation_loss", "bits_per_byte"):
        assert [r[key] for r in validations] == pytest.approx([r[key] for r in expected_validations], rel=1e-5)
    assert (folder / "checkpoints" / "latest").read_text().startswith("step-000006 ")


REFUSED = {
    "heads": ("--tp 3", "parallel.tp=3 must divide n_heads=4", "try 1, 2, 4"),
    "stages": ("--pp 5 --n-layers 4", "n_layers=4 is fewer than parallel.pp=5", "--pp 4"),
    "batch": ("--global-batch-size 7", "train.global_batch_size=7", "use --global-batch-size 6 or 8"),
    "batch of ranks": ("--tp 2 --pp 2 --micro-batch-size 3", "micro_batch_size=3", "--global-batch-size 6 or 9"),
    "zero": ("--pp 2 --zero-stage 3", "parallel.zero_stage=3", "--zero-stage 1"),
    "data": ("--data-path nowhere", "nowhere"),
    "precision": ("--precision bf16 --zero-stage 0", "train.precision=bf16", "--zero-stage 1"),
    "flag": ("--num-layers 3", "unknown flag --num-layers", "--n-layers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_configuration_is_refused_before_ranks_start(name, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")  # which the checks set, and this keeps within the test
    argv, *words = REFUSED[name]
    with pytest.raises(UserError) as refused:
        config = parse_run_config(argv.split())
        ranks_to_start(config)
        with_text(config)
    assert "\n" not in str(refused.value) and all(word in str(refused.value) for word in words), refused.value


def test_a_bad_configuration_is_one_line(cache):
    result = run(cache, "python", "--tp 3")
    result.refused("parallel.tp=3 must divide n_heads=4")
    assert result.out == ""


def test_a_world_that_the_layout_does_not_divide_is_one_line(cache):
    result = run(cache, f"torchrun --nproc-per-node 3 {PROGRAM} --tp 2")
    assert result.code != 0
    assert result.out == ""
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]  # the rest is torchrun's own
    assert len(errors) == 1, result.err
    assert "world size 3 with parallel.tp=2" in errors[0] and "use a multiple of 2 processes" in errors[0]
    assert 'pretrain_gpt.py", line' not in result.err


def test_a_missing_checkpoint_is_one_line_of_two_ranks(first, cache):
    result = run(cache, "python", f"--pp 2 --load {cache}/nowhere {SMALL}")
    result.refused(f"no checkpoint in {cache}/nowhere", "check --load")


def test_a_run_is_not_written_over(first, cache):
    _, folder = first
    before = (folder / "config.yaml").read_text()
    run(cache, "python", f"--save {folder} {SMALL}").refused(f"{folder} holds a run already", f"--load {folder}")
    assert (folder / "config.yaml").read_text() == before


def test_a_nan_in_a_pipeline_is_one_line(first, cache):
    options = f"--pp 2 --debug.detect-nan --lr 1e25 --clip 0 --warmup-steps 0 --save nan {SMALL}"
    result = run(cache, "python", options)
    result.refused("step 2, rank 0: ", "is the first module with a NaN or Inf")
