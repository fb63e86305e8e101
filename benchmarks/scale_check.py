"""What a run of thousands of ranks costs, simulated on this machine: each figure with its goal beside it.

    python -m benchmarks.scale_check                        4,096 ranks on 512 hosts; make scale-check
    python -m benchmarks.scale_check --ranks 256 --json FILE

A part is a function that gives rows. The watch: its judge is the real process, hosts and ranks are fakes that send what
real ones do (tests/processes/watch/fakes.py); processor time is the judge's own, as the kernel counts it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import conditions, headline
from megagpt.errors import ArgumentParser, run_cli
from megagpt.files import json_text
from tests.processes.watch.fakes import LIMITS, FakeRun

RANKS_PER_HOST = 8
STEADY_S = 10.0
FAULTS = ("hang", "stop", "death", "host stop", "host death", "host cut")


@dataclass(frozen=True)
class Row:
    """A figure and what it may be at most."""

    part: str
    name: str
    figure: float
    goal: float
    unit: str
    remark: str = ""

    @property
    def met(self) -> bool:
        """Whether the goal is reached."""
        return self.figure <= self.goal


def watch(n_ranks: int) -> Iterator[Row]:
    """The judge's processor time and messages; who is named, and how long after the limit."""
    n_hosts = n_ranks // RANKS_PER_HOST
    with FakeRun(n_hosts, RANKS_PER_HOST) as run:
        run.open()
        yield Row("watch", "start, judge", run.cpu_s(), 2.0, "CPU-s")
        yield Row("watch", "start, to each host", run.received_bytes / n_hosts, 4096, "bytes")
        yield Row("watch", "connections of the judge", run.n_connections(), n_hosts, "")
        run.go_on(2.0)
        before_s = run.cpu_s()
        run.go_on(STEADY_S)
        yield Row("watch", "steady state, judge", 100 * (run.cpu_s() - before_s) / STEADY_S, 2.0, "% of a core")
    for fault in FAULTS:
        with FakeRun(n_hosts, RANKS_PER_HOST) as run:
            run.open()
            run.go_on(2.0)
            before_s = run.cpu_s()
            run.fail(fault)
            named_s, message = run.message()
            wrong = run.wrongly_named(message)
            yield Row("watch", f"{fault}: named after its limit", named_s, 5.0, "s", message[:100])
            yield Row("watch", f"{fault}: judge, until it has spoken", run.cpu_s() - before_s, 2.0, "CPU-s")
            yield Row("watch", f"{fault}: ranks named wrongly or left out", wrong, 0, "")
            yield Row("watch", f"{fault}: pause between pulses", run.longest_pause_s, LIMITS.heartbeat_timeout_s, "s")


PARTS: dict[str, Callable[[int], Iterator[Row]]] = {"watch": watch}


def main() -> int:
    """Print the table, and write it where --json says; exit code 1 where a goal is missed."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4096, help="of the largest run (default 4096)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--json", type=Path, help="write the figures here")
    a = parser.parse_args()
    about = conditions("benchmarks.scale_check", "cpu")
    print(headline(about))
    rows: list[Row] = []
    for part in a.parts:
        for row in PARTS[part](a.ranks):
            rows.append(row)
            mark = "ok" if row.met else "MISSED"
            print(f"{row.part:8}{row.name:44}{row.figure:10.2f}  goal {row.goal:8g} {row.unit:12}{mark}", flush=True)
    if a.json:
        found = about | {"ranks": a.ranks, "rows": [asdict(row) | {"met": row.met} for row in rows]}
        a.json.write_text(json_text(found, indent=1) + "\n")
    return 0 if all(row.met for row in rows) else 1


if __name__ == "__main__":
    run_cli(main)
