"""Ranks that are really started, watched over, and may be killed: each a process with its own environment."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megagpt.errors import run_cli
from megagpt.processes.local import warm_up
from megagpt.processes.start import distributed
from megagpt.processes.watch.limits import Limits


@dataclass
class Ranks:
    """The processes of a run, whatever becomes of them."""

    folder: Path
    processes: list[Any] = field(default_factory=list)

    def signal(self, rank: int, number: int) -> None:
        """Send a signal to a rank."""
        os.kill(self.processes[rank].pid, number)

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Until every rank has printed that text."""
        deadline = time.monotonic() + timeout_s
        while not all(text in self.output(rank) for rank in range(len(self.processes))):
            assert time.monotonic() < deadline, f"no {text!r}: {self.all_output}"
            time.sleep(0.02)

    def end(self, timeout_s: float, *leave_out: int) -> list[int | None]:
        """Exit codes, when all but those have ended; they must within that time."""
        deadline = time.monotonic() + timeout_s
        for rank, process in enumerate(self.processes):
            if rank not in leave_out:
                process.join(max(0.0, deadline - time.monotonic()))
                assert process.exitcode is not None, f"rank {rank} has not ended: {self.all_output}"
        return [process.exitcode for process in self.processes]

    def output(self, rank: int) -> str:
        """What a rank wrote on stdout and stderr."""
        path = self.folder / f"rank-{rank}.txt"
        return path.read_text() if path.exists() else ""

    @property
    def all_output(self) -> str:
        return "".join(f"--- rank {rank}\n{self.output(rank)}" for rank in range(len(self.processes)))

    @property
    def errors(self) -> list[str]:
        """The error lines of all ranks."""
        return [line for line in self.all_output.splitlines() if line.startswith("error: ")]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.pid:
                process.kill()  # of a stopped one too
                process.join()


def start(
    folder: Path,
    function: Callable[..., Any],
    shape: tuple[int, int, int],
    limits: Limits,
    *args: Any,
    absent: int = -1,
) -> Ranks:
    """Run function(mesh, watch, *args) on pp * dp * tp processes. absent: a rank that is not started."""
    warm_up()
    context = mp.get_context("forkserver")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = Ranks(folder)
    for rank in range(shape[0] * shape[1] * shape[2]):
        ranks.processes.append(context.Process(target=_main, args=(rank, port, folder, shape, limits, function, args)))
        if rank != absent:
            ranks.processes[-1].start()
    return ranks


def _main(
    rank: int,
    port: int,
    folder: Path,
    shape: tuple[int, int, int],
    limits: Limits,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    pp, dp, tp = shape
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(pp * dp * tp))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    output = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def run() -> None:
        with distributed(pp=pp, dp=dp, tp=tp, limits=limits) as (mesh, watch):
            function(mesh, watch, *args)

    code: int | str | None = 1
    try:
        run_cli(run)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)
