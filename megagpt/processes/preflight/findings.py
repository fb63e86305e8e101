"""From what all ranks found to rows: pure functions, so that every verdict can be tested without a cluster.

Slow is what is slow beside its own kind; what a cluster should do, nobody knows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megagpt.config import RunConfig
from megagpt.processes.preflight.facts import Facts
from megagpt.processes.preflight.reach import ranks_text

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


OPEN_FILES = 4096  # a rank holds about 10 sockets a peer of each group, the data's files, and its libraries
ROOM = 1.2  # of memory: the plan counts tensors; the framework, NCCL's buffers and fragmentation come on top
CLOCK_S = 1.0
MAY_DIFFER = ("NVIDIA driver", "GPU")  # works, though a slower GPU makes all wait


def hosts_row(hosts: list[str], problems: dict[int, str], unreached: dict[int, list[int]]) -> Row:
    """Who is there, and who reaches whom. problems: of addresses, by rank. unreached: peers by rank."""
    names = list(dict.fromkeys(hosts))
    counts = ", ".join(f"{name} {hosts.count(name)}" for name in names)
    finding = f"{len(hosts)} ranks on {len(names)} host{'s' * (len(names) > 1)}: {counts}"
    if problems:
        rank, text = next(iter(problems.items()))
        text, _, remedy = text.partition("; ")
        return Row("hosts", "fail", f"{who([rank], hosts)}: {text}", remedy or "name one that is there")
    ways = dict.fromkeys((hosts[rank], hosts[peer]) for rank, peers in unreached.items() for peer in peers)
    if ways:
        text = ", ".join(f"{a} cannot connect to {b}" for a, b in ways)
        remedy = "open the ports between them, all of them: gloo and NCCL choose theirs at random"
        return Row("hosts", "fail", text, f"{remedy}; or name another interface (GLOO_, NCCL_SOCKET_IFNAME)")
    return Row("hosts", "ok", finding + ("; each connects to each" if len(names) > 1 else ""))


def alike_rows(facts: list[Facts]) -> Iterator[Row]:
    """Versions, settings and data, which all ranks must have alike."""
    hosts = [f.host for f in facts]
    packages = _differences([f.versions for f in facts], hosts)
    hard = [text for name, text in packages.items() if name not in MAY_DIFFER]
    shown = [f"{name} {facts[0].versions[name]}" for name in ("python", "torch", "deepspeed", "megagpt")]
    if packages:
        text = "; ".join([*hard, *(text for name, text in packages.items() if name in MAY_DIFFER)])
        state = "fail" if hard else "warn"
        yield Row(
            "versions", state, text, "install the same on all: one shared .venv, or `pip install -c constraints.txt`"
        )
    else:
        yield Row("versions", "ok", ", ".join(shown))
    settings = _differences([f.settings for f in facts], hosts)
    if settings:
        yield Row("settings", "fail", "; ".join(settings.values()), "start all ranks with the same flags and files")
    else:
        yield Row("settings", "ok", f"{len(facts[0].settings)} settings alike")
    yield _data_row(facts, hosts)


def _data_row(facts: list[Facts], hosts: list[str]) -> Row:
    problems = [(f.rank, f.problem) for f in facts if f.problem]
    if problems:
        rank, text = problems[0]
        finding, _, remedy = text.rpartition("; ")
        others = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return Row("data", "fail", f"{who([rank], hosts)}: {finding or text}{others}", remedy)
    readers = [f for f in facts if f.data]
    differing = _differences([f.data for f in readers], [f.host for f in readers])
    if differing:
        remedy = "copy the same .idx, .bin and tokenizer to all hosts, or read them from a shared folder"
        return Row("data", "fail", "; ".join(differing.values()), remedy)
    n_files = len(readers[0].data)
    return Row("data", "ok", f"{n_files} hashes and sizes alike on {len(readers)} host{'s' * (len(readers) > 1)}")


def memory_row(facts: list[Facts]) -> Row:
    """What is free for each rank against what the plan needs."""
    hosts = [f.host for f in facts]
    kind = "host memory" if facts[0].device == "cpu" else "GPU memory"
    worst = min(facts, key=lambda f: f.memory_free - f.memory_needed)
    text = f"{who([worst.rank], hosts)} needs {binary(worst.memory_needed)} and has {binary(worst.memory_free)} free"
    remedy = "more --tp or --pp, --recompute, a smaller --micro-batch-size, a higher --zero-stage; see tools/plan.py"
    if worst.memory_free < worst.memory_needed:
        return Row(kind, "fail", text, remedy)
    tight = [f.rank for f in facts if f.memory_free < ROOM * f.memory_needed]
    if tight:
        return Row(kind, "warn", f"{text}; less than {ROOM:.1f} times that on {who(tight, hosts)}", remedy)
    most = max(f.memory_needed for f in facts)
    return Row(kind, "ok", f"{binary(most)} needed at most, {binary(min(f.memory_free for f in facts))} free at least")


def limits_row(facts: list[Facts]) -> Row:
    """Open files."""
    few = [f.rank for f in facts if f.open_files < OPEN_FILES]
    least = min(f.open_files for f in facts)
    if few:
        text = f"{who(few, [f.host for f in facts])}: at most {least}"
        return Row("open files", "warn", text, "`ulimit -n 65536` before the start, or LimitNOFILE of the service")
    return Row("open files", "ok", f"{least} a rank" if least < 2**31 else "no limit")


def disk_rows(
    found: list[dict], config: RunConfig, place: str, checkpoint_bytes: int, hosts: list[str]
) -> Iterator[Row]:
    """Shared, writable, large and fast enough for the checkpoints that the run will keep."""
    problems = {rank: f["problem"] for rank, f in enumerate(found) if f["problem"]}
    if problems:
        problem = problems.get(0) or next(iter(problems.values()))
        ranks = [rank for rank, text in problems.items() if text == problem]
        remedy = "--save a folder that can be written, on a file system of all hosts"
        yield Row("run folder", "fail", f"{place}: {who(ranks, hosts)} {problem}", remedy)
        return
    yield Row("run folder", "ok", f"{place}: seen and written by all ranks")
    n_kept = checkpoints_kept(config)
    free, needed = min(f["free_bytes"] for f in found), n_kept * checkpoint_bytes
    text = (
        f"{binary(free)} free; {n_kept} checkpoint{'s' * (n_kept > 1)} of {binary(checkpoint_bytes)} = {binary(needed)}"
    )
    if free < checkpoint_bytes:
        yield Row("disk space", "fail", text, "free some, or --save elsewhere")
    elif free < needed:
        yield Row("disk space", "warn", text, "--keep-last 3 keeps the newest only; or --save elsewhere")
    else:
        yield Row("disk space", "ok", text)
    per_s = len(found) * min(f["bytes_per_s"] for f in found)  # the slowest one ends last
    seconds = checkpoint_bytes / per_s
    yield Row(
        "disk speed", "ok", f"{rate(per_s, 'B/s')} by all ranks at once: a checkpoint takes about {seconds:.1f} s"
    )


def checkpoints_kept(config: RunConfig) -> int:
    """How many checkpoints lie on the disk at most, the one being written included."""
    keep = config.checkpoint
    n_saves = max(1, math.ceil(config.train.train_steps / (keep.save_interval or config.train.train_steps)))
    if keep.keep_last is None:
        return n_saves
    n_every = config.train.train_steps // keep.keep_every if keep.keep_every else 0
    return min(n_saves, keep.keep_last + n_every + keep.keep_best + 1)


def clocks_row(offsets_s: list[float], hosts: list[str]) -> Row:
    """Clocks, read by all ranks just after a barrier, against their median; a barrier lets ranks go some ms apart."""
    middle = sorted(offsets_s)[len(offsets_s) // 2]
    off = [rank for rank, offset in enumerate(offsets_s) if abs(offset - middle) > CLOCK_S]
    spread = max(offsets_s) - min(offsets_s)
    if off:
        text = f"{who(off, hosts)} up to {max(abs(offsets_s[rank] - middle) for rank in off):.1f} s off the others"
        return Row("clocks", "warn", text, "let chrony or ntpd set them: logs and time limits would not fit together")
    return Row("clocks", "ok", f"within {max(spread, 0.001) * 1e3:.0f} ms")


def _differences(values: list[dict[str, str]], hosts: list[str]) -> dict[str, str]:
    """Name -> "name is X on rank 0 (a), Y on rank 1 (b)" for what is not the same everywhere."""
    found = {}
    for name in dict.fromkeys(name for each in values for name in each):
        text = split_text({rank: each.get(name, "missing") for rank, each in enumerate(values)}, hosts)
        if text:
            found[name] = f"{name} is {text}"
    return found


SLOW = 1.5  # times slower than the median of the others: warned of, as in training (faults.slow_rank_factor)
SLOW_LINK = 2.0  # likewise for links, which differ more from one try to the next
BROKEN = 5.0  # times worse: it would take the whole run down to its pace
LATENCY_FLOOR_S = 1e-3  # below, a latency several times the others' is scheduling, not a fault
AXES = {
    "model": "every layer waits for it",
    "data": "every step waits for it",
    "pipe": "every micro-batch waits for it",
}


def compute_row(flops_per_s: list[float], precision: str, hosts: list[str]) -> Row:
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


def axes_rows(groups: dict[str, list[Any]], links: list[dict[str, Any]], hosts: list[str]) -> Iterator[Row]:
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
