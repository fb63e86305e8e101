"""One line of the result, and how ranks are named in it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Literal

from megagpt.processes.preflight.board import ranks_text

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Row:
    """check: what was looked at. finding: what was seen. remedy: what to do, "" where nothing is wrong."""

    check: str
    state: State
    finding: str
    remedy: str = ""


def who(ranks: list[int], hosts: list[str]) -> str:
    """[2, 3] -> "ranks 2-3 (node-b)". hosts: of every rank."""
    return f"{ranks_text(ranks)} ({', '.join(dict.fromkeys(hosts[rank] for rank in ranks))})"


def split_text(values: Mapping[int, Hashable], hosts: list[str]) -> str | None:
    """Who has which value: "2.13 on rank 0 (a), 2.12 on rank 1 (b)"; None where all have the same."""
    ranks: dict[Hashable, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    if len(ranks) <= 1:
        return None
    return ", ".join(f"{value} on {who(having, hosts)}" for value, having in ranks.items())


def binary(n_bytes: float) -> str:
    """3221225472 -> "3.0 GiB"."""
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 1024:.1f} KiB"


def rate(per_s: float, unit: str) -> str:
    """2.5e9, "B/s" -> "2.5 GB/s"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if per_s >= size:
            return f"{per_s / size:.3g} {prefix}{unit}"
    return f"{per_s / 1e3:.3g} k{unit}"


def milliseconds(seconds: float) -> str:
    """0.00021 -> "0.21 ms"."""
    return f"{seconds * 1e3:.3g} ms"
