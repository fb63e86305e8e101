"""From measured speeds to rows: slow is what is slow beside its own kind; what a cluster should do, nobody knows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from megagpt.processes.preflight.row import Row, State, milliseconds, rate, who

SLOW = 1.5  # times slower than the median of the others: warned of, as in training (faults.slow_rank_factor)
SLOW_LINK = 2.0  # likewise for links, which differ more from one try to the next
BROKEN = 5.0  # times worse: it would take the whole run down to its pace
LATENCY_FLOOR_S = 1e-3  # below, a latency several times the others' is scheduling, not a fault
AXES = {
    "model": "every layer waits for it",
    "data": "every step waits for it",
    "pipe": "every micro-batch waits for it",
}


def judge_compute(flops_per_s: list[float], precision: str, hosts: list[str]) -> Row:
    """The matrix product of each rank beside the others'."""
    factors = slowness(flops_per_s)
    slow = [rank for rank, factor in enumerate(factors) if factor > SLOW]
    if slow:
        worst = max(slow, key=lambda rank: factors[rank])
        text = f"{who(slow, hosts)} slow: rank {worst} does {rate(flops_per_s[worst], 'FLOP/s')}, "
        text += f"the others {rate(_middle_of_others(flops_per_s, worst), 'FLOP/s')}"
        remedy = "look for other programs, heat, a power limit (nvidia-smi -q -d PERFORMANCE); or leave that host out"
        return Row("compute", _state(max(factors)), text, remedy)
    return Row("compute", "ok", f"{rate(min(flops_per_s), 'FLOP/s')} a rank at least ({precision} matrix product)")


def judge_axes(groups: dict[str, list[Any]], links: list[dict[str, Any]], hosts: list[str]) -> Iterator[Row]:
    """A row an axis. groups: by axis, per rank its all-reduce's figures or None. links: with "axis" and "ranks"."""
    for axis, why in AXES.items():
        of_axis = [link for link in links if link["axis"] == axis]
        if not of_axis:
            continue
        finding = _figures([g for g in groups.get(axis, []) if g], of_axis)
        slow = list(_slow_links(of_axis, hosts))
        if slow:
            worst = max(factor for factor, _, _ in slow)
            texts = "; ".join(text for _, text, _ in slow[:4])
            slow_links = [link for _, _, link in slow]
            more = f" (and {len(slow) - 4} more)" if len(slow) > 4 else ""
            remedy = f"{_remedy(slow_links, hosts)}: {why}"
            yield Row(f"{axis} axis", _state(worst), f"{texts}{more}; {finding}", remedy)
        elif axis == "model" and any(_crosses(link, hosts) for link in of_axis):
            remedy = f"use a --tp that divides the ranks of a host: {why}"
            yield Row("model axis", "warn", f"it goes from host to host; {finding}", remedy)
        else:
            yield Row(f"{axis} axis", "ok", finding)


def slowness(rates: Sequence[float]) -> list[float]:
    """How many times slower than the median of the others each is (1 where it has no others)."""
    return [_middle_of_others(rates, i) / own for i, own in enumerate(rates)]


def _middle_of_others(rates: Sequence[float], i: int) -> float:
    others = [*rates[:i], *rates[i + 1 :]]
    return statistics.median(others) if others else rates[i]


def _slow_links(links: list[dict[str, Any]], hosts: list[str]) -> Iterator[tuple[float, str, dict[str, Any]]]:
    """Factor, text and figures of each link that is slow beside those of its kind: within a host, or between hosts."""
    for crossing in (False, True):
        kind = [link for link in links if _crosses(link, hosts) == crossing]
        by_rate = slowness([link["bytes_per_s"] for link in kind])
        by_latency = slowness([1 / max(link["latency_s"], LATENCY_FLOOR_S) for link in kind])
        for i, link in enumerate(kind):
            factor = max(by_rate[i], by_latency[i])
            if factor > SLOW_LINK:
                others = _middle_of_others([k["bytes_per_s"] for k in kind], i)
                text = f"{_pair(link, hosts)} {_link_text(link)}, others of its kind {rate(others, 'B/s')}"
                yield factor, text, link


def _remedy(slow: list[dict[str, Any]], hosts: list[str]) -> str:
    if any(_crosses(link, hosts) for link in slow):
        return "check cable, card and switch port between them (NCCL_DEBUG=INFO shows the path taken)"
    return "look for other programs on that host, and at its topology (nvidia-smi topo -m)"


def _pair(link: dict[str, Any], hosts: list[str]) -> str:
    a, b = link["ranks"]
    return f"rank {a} ({hosts[a]}) to rank {b} ({hosts[b]}):"


def _link_text(link: dict[str, Any]) -> str:
    return f"{rate(link['bytes_per_s'], 'B/s')}, {milliseconds(link['latency_s'])}"


def _crosses(link: dict[str, Any], hosts: list[str]) -> bool:
    a, b = link["ranks"]
    return hosts[a] != hosts[b]


def _figures(groups: list[dict[str, float]], links: list[dict[str, Any]]) -> str:
    """The worst of the axis: its all-reduce, and its links."""
    text = ""
    if groups:
        slowest, latest = min(g["bytes_per_s"] for g in groups), max(g["latency_s"] for g in groups)
        text = f"all-reduce {rate(slowest, 'B/s')} (bus), {milliseconds(latest)}; "
    slowest, latest = min(link["bytes_per_s"] for link in links), max(link["latency_s"] for link in links)
    return text + f"links {rate(slowest, 'B/s')}, {milliseconds(latest)} at worst"


def _state(factor: float) -> State:
    return "fail" if factor > BROKEN else "warn"
