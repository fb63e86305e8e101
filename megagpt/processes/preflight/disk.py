"""The run folder: one file system for all hosts, space, and the speed of all ranks writing at once."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import torch.distributed as dist

from megagpt.config import RunConfig

PROBE_BYTES = 64 << 20  # of each rank
SEEN_WITHIN_S = 10.0  # network file systems show a new file after a while


def place_to_probe(config: RunConfig) -> Path:
    """The run folder, or the part of its path that exists already, absolute."""
    path = Path(config.checkpoint.save or config.checkpoint.load or "runs").absolute()
    while not path.exists():
        path = path.parent
    return path if path.is_dir() else path.parent


def try_disk(place: Path, rank: int) -> dict:
    """What this rank finds at a place: "problem" (or None), "free_bytes", "bytes_per_s" of writing and flushing.

    Rank 0 makes a folder there; a rank that does not see it is on another file system.
    Comm: three barriers over all processes.
    """
    found: dict = {"problem": None, "free_bytes": 0, "bytes_per_s": 0.0}
    folder = place / f".preflight-{os.environ.get('MASTER_PORT', '0')}"
    if rank == 0:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        except OSError as error:
            found["problem"] = f"cannot write there ({error.strerror})"
    dist.barrier()
    if found["problem"] is None:
        found["problem"] = None if _seen(folder) else "cannot see there what rank 0 has written: it is not shared"
    dist.barrier()  # all write at the same time
    if found["problem"] is None:
        try:
            found["free_bytes"] = shutil.disk_usage(folder).free
            found["bytes_per_s"] = _write_bytes_per_s(folder / f"rank-{rank}", found["free_bytes"])
        except OSError as error:
            found["problem"] = f"cannot write there ({error.strerror})"
    dist.barrier()
    if rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
    return found


def _seen(folder: Path) -> bool:
    end_s = time.monotonic() + SEEN_WITHIN_S
    while not folder.is_dir():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.1)
    return True


def _write_bytes_per_s(path: Path, free_bytes: int) -> float:
    n_bytes = min(PROBE_BYTES, free_bytes // 64)
    block = os.urandom(1 << 20)  # a file system that compresses gains nothing
    start = time.perf_counter()
    with path.open("wb") as file:
        for _ in range(max(1, n_bytes >> 20)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return max(1, n_bytes >> 20) * (1 << 20) / (time.perf_counter() - start)
