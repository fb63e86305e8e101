"""Runs that are asked to end: they finish the step, save, and go on later as if nothing had been."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from megagpt.errors import EXIT_STOPPED, EXIT_USER
from megagpt.processes.local import warm_up
from megagpt.train.metrics_file import read_rows
from tests.soak.case import Layout, command_line, make_dataset
from tests.soak.ranks import Forked

TP2 = Layout(tp=2)
LONG = ["--train-steps", "100000", "--optim.decay-steps", "100"]
pytestmark = pytest.mark.timeout(300)  # on a busy machine


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    warm_up()
    return make_dataset(tmp_path_factory.mktemp("data"))


def start(dataset: str, folder: Path, *options: str) -> Forked:
    return Forked(TP2.n_ranks, [*command_line(TP2, dataset, folder / "run"), *options], str(folder / "notes"), None)


def losses(run: Path) -> dict[int, str]:
    """Loss by step, to the last bit."""
    path = run / "metrics.jsonl"
    return {r["step"]: r["loss"].hex() for r in read_rows(path) if "loss" in r} if path.exists() else {}


def wait_for_step(run: Path, step: int, deadline_s: float = 120) -> None:
    deadline = time.monotonic() + deadline_s
    while max(losses(run), default=0) < step:
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.02)


def said(folder: Path) -> list[str]:
    """The last line that each rank printed."""
    texts = [path.read_text() for path in sorted(folder.glob("notes-rank-*.out"))]
    return [text.strip().splitlines()[-1] if text.strip() else "" for text in texts]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory) -> dict[int, str]:
    """The first 40 losses of a run that nobody stops."""
    folder = tmp_path_factory.mktemp("whole")
    job = start(dataset, folder, *LONG, "--exit-after-minutes", "60")
    wait_for_step(folder / "run", 40)
    job.kill()
    return losses(folder / "run")


def stop(dataset: str, folder: Path, number: signal.Signals, rank: int) -> int:
    """Send a signal to one rank of a run in its first steps, see all end well, and return the steps done."""
    job = start(dataset, folder, *LONG)
    wait_for_step(folder / "run", 2)
    sent = time.monotonic()
    os.kill(job.pids()[rank], number)
    assert job.wait(30) == [EXIT_STOPPED] * 2
    assert time.monotonic() - sent < 10
    (speaking, silent) = said(folder)
    assert speaking == f"received {number.name}; go on with: --load {folder / 'run'}"
    assert "received" not in silent
    done = max(losses(folder / "run"))
    assert (folder / "run" / "checkpoints" / "latest").read_text().startswith(f"step-{done:06d} ")
    return done


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_any_rank_ends_all_after_a_save_within_10_s(number, dataset, tmp_path):
    stop(dataset, tmp_path, number, rank=1)


def test_what_was_stopped_goes_on_as_if_nothing_had_been(dataset, whole, tmp_path):
    done = stop(dataset, tmp_path, signal.SIGTERM, rank=0)
    job = start(dataset, tmp_path, *LONG)
    wait_for_step(tmp_path / "run", done + 3)
    job.kill()
    both = {step: (loss, whole[step]) for step, loss in losses(tmp_path / "run").items() if step in whole}
    assert len(both) > done and all(found == expected for found, expected in both.values())


def test_the_time_limit_does_the_same(dataset, tmp_path):
    job = start(dataset, tmp_path, *LONG, "--exit-after-minutes", "0.05")
    assert job.wait(60) == [EXIT_STOPPED] * 2
    assert said(tmp_path)[0].startswith("the time is up (--exit-after-minutes); go on with: --load ")
    done = max(losses(tmp_path / "run"))
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text().startswith(f"step-{done:06d} ")


def test_of_two_runs_in_one_folder_the_second_is_refused(dataset, tmp_path):
    job = start(dataset, tmp_path, *LONG)
    wait_for_step(tmp_path / "run", 1)
    second = Forked(2, [*command_line(TP2, dataset, tmp_path / "run"), *LONG], str(tmp_path / "second"), None)
    assert second.wait(60) == [EXIT_USER] * 2
    texts = [(tmp_path / f"second-rank-{rank}.out").read_text() for rank in range(2)]
    errors = [line for text in texts for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and f"{tmp_path}/run is being written by another run (process {job.pids()[0]}" in errors[0]
    assert job.codes() is None  # the first goes on
    job.kill()
