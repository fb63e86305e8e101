"""How fast each rank computes, each axis of the mesh carries data, and all ranks write to the run folder.

All ranks measure at the same time, as they would train, so that a shared card, switch or core shows.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagpt.config import RunConfig
from megagpt.files import os_reason
from megagpt.parallel.axis import Axis
from megagpt.parallel.mesh import Mesh

# The best one counts: the others had to share with somebody, on a machine that does other things too.
LATENCY_REPEATS = 20
REPEATS = 5  # of what is large
MATMUL_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Sizes:
    """How much is moved and multiplied. A GPU needs more than a CPU to show what it can."""

    message_bytes: int
    matmul_width: int

    @staticmethod
    def of(device: torch.device) -> Sizes:
        """For a device."""
        return Sizes(256 << 20, 8192) if device.type == "cuda" else Sizes(8 << 20, 768)


def matmul_flops_per_s(device: torch.device, precision: str, width: int) -> float:
    """FLOP/s of square matrix products of that width: the best of some, in the precision of the run."""
    a, b = (torch.randn(width, width, device=device).to(MATMUL_DTYPE[precision]) for _ in range(2))
    torch.mm(a, b)
    dist.barrier()
    return 2 * width**3 / min(_times(lambda: torch.mm(a, b), device, 2 * REPEATS))


def axis_speed(mesh: Mesh, name: str, device: torch.device, n_bytes: int) -> dict[str, Any] | None:
    """Latency (s) and bus bandwidth (bytes/s) of this rank's all-reduce over an axis; None where it has one rank.

    Bus bandwidth, 2 (n - 1) / n of the bytes over the time, is what each link carries, whatever the number of ranks n.
    Comm: all-reduces over the axis.
    """
    axis: Axis = getattr(mesh, name)
    if axis.size == 1:
        return None
    small, large = torch.ones(1, device=device), torch.ones(n_bytes // 4, device=device)
    dist.all_reduce(small, group=axis.group)  # the first one opens connections
    dist.all_reduce(large, group=axis.group)
    dist.barrier()
    latency_s = min(_times(lambda: dist.all_reduce(small, group=axis.group), device, LATENCY_REPEATS))
    seconds = min(_times(lambda: dist.all_reduce(large, group=axis.group), device, REPEATS))
    return {"latency_s": latency_s, "bytes_per_s": 2 * (axis.size - 1) / axis.size * n_bytes / seconds}


def link_speeds(mesh: Mesh, name: str, device: torch.device, n_bytes: int) -> list[dict[str, Any]]:
    """Latency (s) and bandwidth (bytes/s) of the links to this rank's neighbours on an axis, as the lower rank saw it.

    First the pairs (0, 1), (2, 3), …, then (1, 2), (3, 4), …: each rank is in one pair at a time, and the time does
    not grow with the number of ranks. Comm: send and receive between neighbours.
    """
    axis: Axis = getattr(mesh, name)
    found = []
    for parity in (0, 1):
        lower = axis.rank % 2 == parity
        peer = axis.rank + 1 if lower else axis.rank - 1
        dist.barrier()
        if axis.size == 1 or not 0 <= peer < axis.size:
            continue
        latency_s = min(_ping_pong(axis, peer, lower, torch.ones(1, device=device), LATENCY_REPEATS))
        seconds = min(_ping_pong(axis, peer, lower, torch.ones(n_bytes // 4, device=device), REPEATS))
        if lower:
            assert axis.group is not None  # size > 1
            other = dist.get_global_rank(axis.group, peer)
            found.append({"ranks": [mesh.rank, other], "latency_s": latency_s, "bytes_per_s": n_bytes / seconds})
    return found


def _ping_pong(axis: Axis, peer: int, first: bool, message: torch.Tensor, repeats: int) -> list[float]:
    """Seconds of one way: half of there and back, after a first time that opens the connection."""

    def send() -> None:
        dist.send(message, group=axis.group, group_dst=peer)

    def receive() -> None:
        dist.recv(message, group=axis.group, group_src=peer)

    def there_and_back() -> None:
        for step in (send, receive) if first else (receive, send):
            step()

    there_and_back()
    return [seconds / 2 for seconds in _times(there_and_back, message.device, repeats)]


def _times(function: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    return [_seconds(function, device) for _ in range(repeats)]


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    _finish(device)
    start = time.perf_counter()
    function()
    _finish(device)
    return time.perf_counter() - start


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
            found["problem"] = f"cannot write there ({os_reason(error)})"
    dist.barrier()
    if found["problem"] is None:
        found["problem"] = None if _seen(folder) else "cannot see there what rank 0 has written: it is not shared"
    dist.barrier()  # all write at the same time
    if found["problem"] is None:
        try:
            found["free_bytes"] = shutil.disk_usage(folder).free
            found["bytes_per_s"] = _write_bytes_per_s(folder / f"rank-{rank}", found["free_bytes"])
        except OSError as error:
            found["problem"] = f"cannot write there ({os_reason(error)})"
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
