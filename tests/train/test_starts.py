"""What happens between a start and the first step: two runs at once, a host that lacks the data."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import time
from pathlib import Path

from megagpt.errors import EXIT_USER
from megagpt.processes.local import warm_up
from megagpt.train.pretrain import pretrain
from megagpt.train.run import _new_folder
from tests.processes.watch.watched import Ranks
from tests.soak.ranks import free_port
from tests.tiny_data import VOCAB_SIZE, write_tiny_data

SMALL = ["--n-layers", "1", "--d-model", "32", "--seq-len", "32", "--train-steps", "1", "--tp", "2"]


def test_two_starts_in_one_second_have_two_folders(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda form: "20260101-000000")
    assert [str(_new_folder()) for _ in range(3)] == [f"runs/20260101-000000{end}" for end in ("", "-2", "-3")]


def start_on_a_host(rank: int, port: int, folder: Path, argv: list[str]) -> None:
    """One of two ranks that no launcher has said to be on one machine."""
    for number in (1, 2):
        os.dup2(os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK="0")
    with contextlib.suppress(KeyError):
        del os.environ["LOCAL_WORLD_SIZE"]
    pretrain(argv)


def test_data_that_one_host_lacks_ends_all_with_its_message(tmp_path: Path):
    """At once: nobody waits for the rank that has nothing to train on."""
    warm_up()
    data, port = write_tiny_data(tmp_path / "tiny"), free_port()
    context = multiprocessing.get_context("forkserver")
    ranks = Ranks(tmp_path)
    for rank, words in enumerate([[data, "--vocab-size", str(VOCAB_SIZE)], [f"{tmp_path}/nowhere"]]):
        argv = [*SMALL, "--save", str(tmp_path / "run"), "--data-path", *words]
        ranks.processes.append(context.Process(target=start_on_a_host, args=(rank, port, tmp_path, argv)))
        ranks.processes[-1].start()
    with ranks:
        assert ranks.end(120.0) == [EXIT_USER] * 2
        (error,) = ranks.errors
        assert error.startswith(f"error: {socket.gethostname()}: ") and "nowhere" in error, error
        assert "Traceback" not in ranks.all_output
