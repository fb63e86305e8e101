"""What the machine at hand reaches: matrix products over depths, copies, launches, collectives over sizes."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist

_DEPTHS = (64, 256, 1024, 4096)
_KERNELS_OF_A_BLOCK = 40  # launches of one pass, about


def matrix_rates(device: torch.device, dtype: torch.dtype, width: int, seconds: float = 0.3) -> dict[int, float]:
    """FLOP/s of a product (width, k) x (k, width), by k."""
    rates = {}
    for depth in _DEPTHS:
        a = torch.randn(width, depth, device=device, dtype=dtype)
        b = torch.randn(depth, width, device=device, dtype=dtype)
        rates[depth] = 2 * width * width * depth / timed(lambda a=a, b=b: torch.mm(a, b), device, seconds)
    return rates


def half_depth(rates: dict[int, float]) -> tuple[float, float]:
    """The rate at great depth, and the depth of half of it: rate = r k / (k + h), a line in 1 / rate over 1 / k."""
    depths = np.array(list(rates), dtype=float)
    slope, at_infinity = np.polyfit(1 / depths, 1 / np.array(list(rates.values())), 1)
    best = 1 / at_infinity if at_infinity > 0 else max(rates.values())
    return float(best), float(max(1.0, slope * best))


def copy_rate(device: torch.device, size: int, seconds: float = 0.3) -> float:
    """Bytes read and written a second by a copy of `size` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / timed(lambda: target.copy_(source), device, seconds)


def host_us(device: torch.device) -> float:
    """Microseconds to launch the kernels of a block, from that of a small one."""
    small = torch.ones(16, device=device)
    return 1e6 * _KERNELS_OF_A_BLOCK * timed(lambda: small.add_(1.0), device, 0.2, burst=200)


def all_reduce_line(device: torch.device, sizes: tuple[int, ...]) -> tuple[float, float]:
    """Bytes/s of a link of the ring, and microseconds of one of its steps, of all ranks there are.

    Comm: all-reduces over the default group.
    """
    n = dist.get_world_size()
    taken = []
    for size in sizes:
        tensor = torch.ones(size // 4, device=device)
        taken.append(timed(lambda t=tensor: dist.all_reduce(t), device, 0.0, least=8))
    slope, start = np.polyfit(2 * (n - 1) / n * np.array(sizes, dtype=float), np.array(taken), 1)
    return float(1 / max(slope, 1e-15)), float(max(1e6 * start / (2 * (n - 1)), 0.01))


def timed(call: Callable[[], object], device: torch.device, seconds: float, *, burst: int = 1, least: int = 3) -> float:
    """The shortest of a call's times, which other programs disturbed least, in about so many seconds and `least` calls.

    burst: calls timed at once.
    """
    call()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        _wait(device)
        start = time.perf_counter()
        for _ in range(burst):
            call()
        _wait(device)
        times.append(time.perf_counter() - start)
    return min(times) / burst


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
