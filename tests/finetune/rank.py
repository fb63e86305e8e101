"""A process that runs the program of fine-tuning, and may be killed at a step: a fork of one that has torch."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

from megagpt.processes.local import warm_up


def run_program(argv: list[str], out: Path, n_ranks: int = 1, killed_at: int | None = None) -> list[int]:
    """Exit codes of ranks that run `finetune_gpt.py` with these arguments; what they print is appended to `out`.

    killed_at: the number of the step, from 0, before which rank 0 gets SIGKILL.
    """
    warm_up()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    ranks = [
        context.Process(target=_rank_main, args=(rank, n_ranks, port, argv, str(out), killed_at))
        for rank in range(n_ranks)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [process.exitcode or 0 for process in ranks]


def _rank_main(rank: int, n_ranks: int, port: int, argv: list[str], out: str, killed_at: int | None) -> None:
    for number in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), number)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n_ranks), LOCAL_SIZE=str(n_ranks))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    importlib.import_module("torch").set_num_threads(1)
    if killed_at is not None and rank == 0:
        _kill_before(killed_at)
    importlib.import_module("megagpt.finetune.start").finetune(argv)  # ends the process


def _kill_before(killed_at: int) -> None:
    engine: Any = importlib.import_module("megagpt.train.step.engine").Engine
    train_step = engine.train_step

    def watched(self: Any, step: int, batches: Any) -> Any:
        if step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return train_step(self, step, batches)

    engine.train_step = watched
