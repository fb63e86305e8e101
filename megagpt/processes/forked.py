"""The ranks of one machine, forked from this process: what it has imported, they have.

Four ranks that import torch and DeepSpeed each for itself take the processors for half a minute. This process waits for
them, hands on its signals, and ends as they did; they follow it, should it be killed.
"""

from __future__ import annotations

import contextlib
import gc
import math
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from types import FrameType

from megagpt.errors import EXIT_PEER_LOST
from megagpt.processes.signals import follow_parent, heard_signals

GRACE_S = 20.0  # for the others, once one has ended badly: they say why, or have nothing to say
# What would misinform the ranks, should a launcher have started this process. The last one is a trap of torchrun's:
# rank 0 would not open the store that all the ranks then wait for.
FROM_A_LAUNCHER = (
    "GROUP_RANK", "ROLE_RANK", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "CROSS_RANK", "CROSS_SIZE",
    "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip


def run_forked(n_ranks: int, main: Callable[[], None]) -> int:
    """Run main in n_ranks processes of this machine; returns the exit code.

    main: ends its process (`pretrain.run_program`). What must not happen before a fork: threads that hold locks.
    """
    port = _free_port()
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=_be_rank, args=(rank, n_ranks, port, main)) for rank in range(n_ranks)]
    gc.freeze()  # else a collection in one rank copies all that the ranks share
    signals, received = heard_signals(), []

    def hand_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for process in ranks:
            if process.pid and process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # until there is somebody to hand them to
    try:
        for process in ranks:
            process.start()
        for number in signals:
            signal.signal(number, hand_on)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    first = _wait_for(ranks)
    # Of a signal that came before the training had begun, or a second one.
    if received and first in (-received[-1], 128 + received[-1], EXIT_PEER_LOST):
        return 128 + received[-1]
    if first < 0:  # the other ranks name the one that was killed; by what, only its parent knows
        print(f"note: a rank was killed by signal {-first} (9: often for lack of memory)", file=sys.stderr)
        return EXIT_PEER_LOST  # as those others
    return first


def _be_rank(rank: int, n_ranks: int, port: int, main: Callable[[], None]) -> None:
    parent = multiprocessing.parent_process()
    os.setsid()  # a Ctrl-C at the terminal reaches the ranks once: from the parent
    follow_parent()
    if parent is None or os.getppid() != parent.pid:  # it has ended already
        os._exit(EXIT_PEER_LOST)
    for name in FROM_A_LAUNCHER:
        os.environ.pop(name, None)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n_ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(n_ranks), LOCAL_SIZE=str(n_ranks))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, heard_signals())
    main()


def _wait_for(ranks: Sequence[BaseProcess]) -> int:
    """Until all have ended; the exit code of the first that did not end with 0, else 0."""
    first, deadline_s = 0, math.inf
    while True:
        living = [process for process in ranks if process.exitcode is None]
        first = first or next((process.exitcode for process in ranks if process.exitcode), 0)
        if not living:
            return first
        if first:
            deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
        if time.monotonic() > deadline_s:
            for process in living:
                process.kill()
        wait([process.sentinel for process in living], timeout=1.0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
