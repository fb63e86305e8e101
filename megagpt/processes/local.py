"""Several ranks on one machine, from within a Python program: what tests, parity walks and benchmarks use.

A fork server imports the heavy packages once; each call forks fresh ranks from it in a fraction of a second.
So every case starts from a clean state (DeepSpeed keeps module-level state), and none pays for the imports again.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing as mp
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ("torch", "megagpt.train.text", "megagpt.train.step.deepspeed.preload")


def run_ranks(
    function: Callable[..., Any], n_ranks: int, *args: Any, timeout_s: float = 120.0, n_threads: int = 1
) -> list[Any]:
    """Call function(*args) on n_ranks gloo processes; returns what each rank returned, in rank order.

    function must be importable (not a lambda). With n_ranks = 1 torch.distributed is initialised as well.
    n_threads: of each rank. With small tensors more than one gains nothing, and on a busy machine costs 10 times more.
    Raises RuntimeError with the first failing rank's traceback, TimeoutError when some rank has not answered.
    """
    warm_up()
    context = mp.get_context("forkserver")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(n_ranks)]
        ranks = [
            context.Process(
                target=_rank_main, args=(rank, n_ranks, n_threads, folder, timeout_s, child_end, function, args)
            )
            for rank, (_, child_end) in enumerate(pipes)
        ]
        try:
            for process in ranks:
                process.start()
            return _collect([parent_end for parent_end, _ in pipes], ranks, timeout_s)
        finally:
            for pipe in pipes:
                for end in pipe:
                    end.close()
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def warm_up(*modules: str) -> None:
    """Start the fork server now: its imports then run beside what the caller does next.

    modules: what it imports for the ranks beside `PRELOAD`.
    """
    mp.get_context("forkserver").set_forkserver_preload([*PRELOAD, *modules])
    before = os.environ.get("DS_ACCELERATOR")
    # DeepSpeed looks once, while it is imported, and a GPU would not survive the forks.
    os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["DS_ACCELERATOR"]
        if before is not None:
            os.environ["DS_ACCELERATOR"] = before


def _collect(receivers: Sequence[Connection], ranks: Sequence[Any], timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    pending = {receiver: rank for rank, receiver in enumerate(receivers)}
    sentinels = {process.sentinel: rank for rank, process in enumerate(ranks)}
    while pending:
        ready = wait([*pending, *(s for s, r in sentinels.items() if r not in results)], timeout=timeout_s)
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending.values())} gave no answer within {timeout_s:.0f} s")
        for item in ready:
            if isinstance(item, Connection):
                rank = pending.pop(item, None)
                if rank is not None:
                    ok, results[rank] = item.recv()
                    if not ok:
                        raise RuntimeError(f"rank {rank} failed:\n{results[rank]}")
            elif not receivers[sentinels[item]].poll():
                raise RuntimeError(f"rank {sentinels[item]} died with exit code {ranks[sentinels[item]].exitcode}")
    return [results[rank] for rank in range(len(ranks))]


def _rank_main(
    rank: int,
    size: int,
    n_threads: int,
    folder: str,
    timeout_s: float,
    connection: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_SIZE=str(size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    torch.set_num_threads(n_threads)
    gc.freeze()  # DeepSpeed collects garbage at each start in 16 bits: a second or two, if it goes through all imports
    try:
        store = dist.FileStore(os.path.join(folder, "store"), size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s))
        answer = (True, function(*args))
    except BaseException:
        answer = (False, traceback.format_exc())
    # The parent stops listening when another rank fails.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.send(answer)
        # Tensors travel as shared memory: stay until the parent has taken them and hangs up.
        connection.poll(timeout_s)
    if answer[0]:
        dist.destroy_process_group()
