"""The whole server on two ranks: a signal, a rank that dies; and what is refused before a model is loaded."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megagpt.errors import EXIT_PEER_LOST, UserError
from megagpt.processes.local import warm_up
from megagpt.serve import check_installed
from megagpt.serve.server import Settings, open_door, serve
from megagpt.train.pretrain import run_program
from tests.serve.serving import ask
from tests.serve.small_run import write_run
from tests.soak.ranks import free_port


class Program:
    """The server's ranks, forked from a process that has its imports; what they say is in `output`."""

    def __init__(self, n_ranks: int, settings: Settings, output: Path) -> None:
        context, port, self._output = multiprocessing.get_context("forkserver"), free_port(), output
        self.ranks: list[Any] = [
            context.Process(target=_rank_main, args=(rank, n_ranks, port, settings, str(output)))
            for rank in range(n_ranks)
        ]
        for rank in self.ranks:
            rank.start()

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def address(self) -> str:
        """Once it listens."""
        while not (found := re.search(r"listens on (\S+)", self.output)):
            assert any(rank.is_alive() for rank in self.ranks), self.output
            time.sleep(0.05)
        return found[1]

    def codes(self) -> list[int | None]:
        """Once all have ended; a rank that does not is killed, and has None."""
        for rank in self.ranks:
            rank.join(60)
        codes = [rank.exitcode for rank in self.ranks]
        for rank in self.ranks:
            rank.kill()
        return codes


def _rank_main(rank: int, n_ranks: int, port: int, settings: Settings, output: str) -> None:
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_ranks), LOCAL_WORLD_SIZE=str(n_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    run_program(lambda: serve(settings))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[str]:
    warm_up("megagpt.serve.server")
    return write_run(tmp_path_factory.mktemp("run") / "small")


def test_a_signal_lets_it_finish_what_runs(run: str, tmp_path: Path):
    program = Program(2, Settings(load=run, port=0, pp=2, batch=1), tmp_path / "out")
    url, asked = f"{program.address()}/v1/completions", {"prompt": "a", "n": 6, "max_tokens": 60, "seed": 1}
    whole = ask(url, asked)[2]["choices"]
    with ThreadPoolExecutor() as pool:
        last = pool.submit(ask, url, asked)
        while "running 0.0" in ask(f"{program.address()}/metrics")[2]:
            time.sleep(0.01)
        for rank in program.ranks:  # as a launcher does
            os.kill(rank.pid, signal.SIGTERM)
        assert last.result()[2]["choices"] == whole
    assert program.codes() == [0, 0], program.output
    assert "error" not in program.output and "Traceback" not in program.output


def test_a_rank_that_dies_ends_it_with_the_watchs_message(run: str, tmp_path: Path):
    program = Program(2, Settings(load=run, port=0), tmp_path / "out")
    program.address()
    program.ranks[1].kill()
    assert program.codes() == [EXIT_PEER_LOST, -signal.SIGKILL], program.output
    assert re.search(r"error: rank 1 \(pipe 0, data 0, model 1\) on \S+ died", program.output)


def test_what_is_refused_before_a_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "key").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for given, words in (
            ({"port": port}, f"cannot listen on --host 127.0.0.1 --port {port}: Address already in use; name others"),
            ({"host": "no.such.host.invalid"}, "cannot listen on --host no.such.host.invalid"),
            ({"api_key_file": str(tmp_path / "none")}, "cannot be read"),
            ({"api_key_file": str(tmp_path / "key")}, "is empty; wanted a key"),
        ):
            with pytest.raises(UserError, match=re.escape(words)):
                open_door(Settings(load="x", **given))
    with pytest.raises(UserError, match="got --batch 0 wanted 1 or more"):
        Settings(load="x", batch=0).check()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the server needs starlette, uvicorn.*; run: pip install 'megagpt\[serve\]'"):
        check_installed()
