"""From what all ranks found to rows: pure functions, so that every verdict can be tested without a cluster."""

from __future__ import annotations

import math
from collections.abc import Iterator

from megagpt.config import RunConfig
from megagpt.processes.preflight.facts import Facts
from megagpt.processes.preflight.row import Row, binary, rate, split_text, who

OPEN_FILES = 4096  # a rank holds about 10 sockets a peer of each group, the data's files, and its libraries
ROOM = 1.2  # of memory: the plan counts tensors; the framework, NCCL's buffers and fragmentation come on top
CLOCK_S = 1.0
MAY_DIFFER = ("NVIDIA driver", "GPU")  # works, though a slower GPU makes all wait


def judge_hosts(hosts: list[str], problems: dict[int, str], unreached: dict[int, list[int]]) -> Row:
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


def judge_alike(facts: list[Facts]) -> Iterator[Row]:
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
    yield _judge_data(facts, hosts)


def _judge_data(facts: list[Facts], hosts: list[str]) -> Row:
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


def judge_memory(facts: list[Facts]) -> Row:
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


def judge_limits(facts: list[Facts]) -> Row:
    """Open files."""
    few = [f.rank for f in facts if f.open_files < OPEN_FILES]
    least = min(f.open_files for f in facts)
    if few:
        text = f"{who(few, [f.host for f in facts])}: at most {least}"
        return Row("open files", "warn", text, "`ulimit -n 65536` before the start, or LimitNOFILE of the service")
    return Row("open files", "ok", f"{least} a rank" if least < 2**31 else "no limit")


def judge_disk(
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


def judge_clocks(offsets_s: list[float], hosts: list[str]) -> Row:
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
