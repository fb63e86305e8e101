"""Starting the program in three ways, with the process id of each rank: what a kill needs.

"fork": ranks from the fork server, a start of 0.2 s. "program": `python examples/pretrain_gpt.py`, which starts its
ranks itself. "torchrun": torchrun --max-restarts, which also starts them again by itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

from tests.soak.rank import rank_main

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "examples" / "pretrain_gpt.py"
POLL_S = 0.01

Way = Literal["fork", "program", "torchrun"]


class Job:
    """A running job: its ranks, and how it ended."""

    restarts_itself = False

    def pids(self) -> dict[int, int]:
        """Process id by rank, of the ranks that live."""
        raise NotImplementedError

    def codes(self) -> list[int] | None:
        """Exit codes, once all processes have ended; -9 of a killed one."""
        raise NotImplementedError

    def kill(self) -> None:
        """End what is left of it."""
        raise NotImplementedError

    def wait(self, timeout_s: float) -> list[int] | None:
        """Exit codes; None where it has not ended in time."""
        deadline = time.monotonic() + timeout_s
        while (codes := self.codes()) is None and time.monotonic() < deadline:
            time.sleep(POLL_S)
        return codes


def start(way: Way, n_ranks: int, argv: list[str], notes: Path, plant: str | None = None) -> Job:
    """Start the program with these arguments. notes: what the files that it leaves beside the run begin with."""
    if way == "fork":
        return Forked(n_ranks, argv, str(notes), plant)
    assert plant is None
    command = [sys.executable, str(PROGRAM)]
    if way == "torchrun":
        torchrun = str(Path(sys.executable).with_name("torchrun"))
        command = [torchrun, "--standalone", f"--nproc-per-node={n_ranks}", "--max-restarts=9", str(PROGRAM)]
    return Launched([*command, *argv], notes, restarts_itself=way == "torchrun")


class Forked(Job):
    """Ranks from the fork server; `warm_up` comes first, once, before threads of this process start ranks."""

    def __init__(self, n_ranks: int, argv: list[str], notes: str, plant: str | None) -> None:
        context = multiprocessing.get_context("forkserver")
        port = free_port()
        self._ranks: list[Any] = [
            context.Process(target=rank_main, args=(rank, n_ranks, port, argv, f"{notes}-rank-{rank}", plant))
            for rank in range(n_ranks)
        ]
        for process in self._ranks:
            process.start()

    def pids(self) -> dict[int, int]:
        return {rank: process.pid for rank, process in enumerate(self._ranks) if process.is_alive()}

    def codes(self) -> list[int] | None:
        codes = [process.exitcode for process in self._ranks]
        return None if None in codes else codes

    def kill(self) -> None:
        for process in self._ranks:
            process.kill()
            process.join()


class Launched(Job):
    """The program as a command; its processes are found by a mark in their environment, whoever started them."""

    def __init__(self, command: list[str], notes: Path, *, restarts_itself: bool) -> None:
        self.restarts_itself = restarts_itself
        self._mark = f"MEGAGPT_SOAK={notes}".encode()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MEGAGPT_SOAK": str(notes)}
        with notes.with_name(notes.name + ".out").open("ab") as out:
            self._process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def pids(self) -> dict[int, int]:
        ranks = {}
        for pid, environment in self._living().items():
            names = [item.removeprefix(b"RANK=") for item in environment if item.startswith(b"RANK=")]
            if names and str(PROGRAM).encode() in _read(pid, "cmdline"):  # else a helper of a rank
                ranks[int(names[0])] = pid
        # Ranks that the program forks have its environment; they are its children, the first rank first.
        return ranks or dict(enumerate(sorted(pid for pid in self._living() if _parent(pid) == self._process.pid)))

    def codes(self) -> list[int] | None:
        code = self._process.poll()
        return None if code is None or self._living() else [code]

    def kill(self) -> None:
        for pid in self._living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()

    def _living(self) -> dict[int, list[bytes]]:
        """Process id: environment. A process that has ended has none."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        environments = {pid: _read(pid, "environ") for pid in pids}
        return {pid: environment for pid, environment in environments.items() if self._mark in environment}


def _read(pid: int, name: str) -> list[bytes]:
    """The strings of a file under /proc; none where the process has ended or is another user's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def _parent(pid: int) -> int | None:
    """The process that started this one; None where it has ended."""
    (status, *_) = _read(pid, "stat") or [b""]
    words = status.rpartition(b")")[2].split()
    return int(words[1]) if words else None


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
