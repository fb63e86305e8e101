"""Thousands of ranks that are not there, watched over by the real judge in its own process.

Each host is a connection and a `HostWatch`'s messages, made here by hand; so that one process can be all of them.
Ranks wait as in training: those of a host in an all-reduce over the model axis, the first of each over the data axis.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import selectors
import socket
import time
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megagpt.parallel.naming import rank_name
from megagpt.processes.watch.host import DEPUTY_HOST
from megagpt.processes.watch.judge import Judge
from megagpt.processes.watch.limits import Limits
from megagpt.processes.watch.verdict import needs
from megagpt.processes.watch.wire import Wire, line_of

TOKEN = "00c0ffee"
LIMITS = Limits(heartbeat_timeout_s=6.0, progress_timeout_s=60.0)
BAD = 3  # the bad rank's number on its host
STACK = [f"megagpt/train/step/a_module_of_the_stack.py:{100 + i} a_function_of_it" for i in range(25)]
RECORD = {
    "groups": {str(i): {"last_completed_collective": 100 + i} for i in range(6)},
    "unfinished": [{"x": "y" * 800}],
}


def be_judge(pipe: Connection, listener: socket.socket, stderr: str, n_hosts: int, n_local: int) -> None:
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    hosts = [range(h * n_local, (h + 1) * n_local) for h in range(n_hosts)]
    names = [rank_name(rank, dp=n_hosts, tp=n_local) for rank in range(n_hosts * n_local)]
    os._exit(Judge(listener, TOKEN, hosts, names, [range(n_hosts * n_local)], LIMITS).run())


@dataclass
class FakeHost:
    """state: "runs", "stops" (all ranks were stopped), "cut" (it says nothing)."""

    number: int
    wire: Wire
    ranks: range
    next_beat_s: float
    state: str = "runs"
    heard_s: float = 0.0
    bad: dict[str, Any] = field(default_factory=dict)


class FakeRun:
    """n_hosts hosts with n_local ranks each, tp within a host, dp across; and their judge."""

    def __init__(self, n_hosts: int, n_local: int, folder: Path | None = None) -> None:
        self._n_hosts, self._n_local = n_hosts, n_local
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=n_hosts)
        self._stderr = Path(f"/tmp/megagpt-scale-{os.getpid()}.txt") if folder is None else folder / "judge.txt"
        self._stderr.unlink(missing_ok=True)
        context = multiprocessing.get_context("fork")
        arguments = (None, self._listener, str(self._stderr), n_hosts, n_local)
        self.judge = context.Process(target=be_judge, args=arguments)
        self._selector = selectors.DefaultSelector()
        self._hosts: list[FakeHost] = []
        self._culprit, self._failed_s, self._limit_s = range(0), 0.0, 0.0
        self._step = 0
        self.received_bytes, self.longest_pause_s = 0, 0.0

    def __enter__(self) -> FakeRun:
        self.judge.start()
        self._began_s = self.cpu_s()
        return self

    def __exit__(self, *_: object) -> None:
        self.judge.kill()
        self.judge.join()
        for host in self._hosts:
            host.wire.close()
        self._selector.close()
        self._listener.close()
        self._stderr.unlink(missing_ok=True)

    def cpu_s(self) -> float:
        """Seconds of a processor that the judge has had."""
        return int(Path(f"/proc/{self.judge.pid}/schedstat").read_text().split()[0]) / 1e9

    def n_connections(self) -> int:
        """Sockets that the judge has open since its start."""
        return self._n_sockets() - self._n_sockets_before

    def _n_sockets(self) -> int:
        found = 0
        for link in Path(f"/proc/{self.judge.pid}/fd").iterdir():
            with suppress(FileNotFoundError):  # closed meanwhile
                found += os.readlink(link).startswith("socket")
        return found

    def open(self) -> None:
        """All hosts come, and are told what they have to know."""
        self._n_sockets_before = self._n_sockets()
        now_s = time.monotonic()
        for number in range(self._n_hosts):
            wire = Wire(socket.create_connection(self._listener.getsockname()))
            ranks = range(number * self._n_local, (number + 1) * self._n_local)
            self._hosts.append(FakeHost(number, wire, ranks, now_s + LIMITS.host_beat_s * number / self._n_hosts))
            wire.send(token=TOKEN, number=number, host=f"node-{number:03d}", pid=1 << 22)
            if number == DEPUTY_HOST:
                wire.send(deputy=("127.0.0.1", 1))
            self._selector.register(wire.socket, selectors.EVENT_READ, self._hosts[-1])
        opened: set[int] = set()
        while len(opened) < self._n_hosts:
            opened |= {host.number for host, message in self._hear() if "judges" in message}
        for host in self._hosts:
            host.heard_s = time.monotonic()
        self.longest_pause_s = 0.0

    def go_on(self, seconds: float) -> None:
        """Steps, for so long."""
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self._turn()

    def fail(self, fault: str) -> None:
        """Plant a fault in the middle of the run. Its limit counts from here."""
        host = self._hosts[self._n_hosts // 2]
        rank = host.ranks[BAD]
        self._failed_s, self._culprit = time.monotonic(), range(rank, rank + 1)
        host.next_beat_s = self._failed_s  # a host tells at once what has changed for its ranks
        if fault.startswith("host"):
            self._culprit = host.ranks
        if fault == "hang":
            host.bad = {"hangs": True}
        elif fault in ("stop", "death"):
            state = "stopped" if fault == "stop" else "died"
            host.wire.send(rank=rank, lost=state, beat=self._beat(rank))
            host.bad = {"lost": True}
        elif fault == "host death":
            self._selector.unregister(host.wire.socket)
            host.wire.close()
            host.state = "cut"
        else:
            host.state, self._limit_s = ("stops" if fault == "host stop" else "cut"), LIMITS.heartbeat_timeout_s

    def message(self) -> tuple[float, str]:
        """Seconds after the limit at which the judge spoke, and what it said."""
        while "\n" not in (said := self._stderr.read_text()):
            assert self.judge.is_alive() and time.monotonic() < self._failed_s + self._limit_s + 60.0
            self._turn()
        return max(0.0, time.monotonic() - self._failed_s - self._limit_s), said

    def wrongly_named(self, message: str) -> int:
        """How many ranks the message blames that are not the bad ones, or leaves out."""
        subject = re.split(r" (?:died|hangs|was stopped|gave no sign|wait for)", message)[0]
        named = {int(rank) for rank in re.findall(r"rank (\d+) ", subject)}
        more = int(found[1]) if (found := re.search(r"and (\d+) more on ", subject)) else 0
        if "the watch on" in subject:  # the process of a host, by the name of that
            return int(f"the watch on node-{self._culprit.start // self._n_local:03d}" not in subject)
        return len(named - {*self._culprit}) + abs(len(named) + more - len(self._culprit))

    def _turn(self) -> None:
        now_s = time.monotonic()
        for host in self._hosts:
            if now_s >= host.next_beat_s and host.state != "cut":
                host.next_beat_s += LIMITS.host_beat_s
                paused = host.state == "stops"
                silent = paused or "lost" in host.bad
                host.wire.send(silent=silent, paused=paused, hangs=host.bad.get("hangs", False))
        for host, message in self._hear():
            if message.get("details") and host.state != "cut":
                host.wire.send(beats=[self._beat(rank) for rank in host.ranks])
            if "where" in message and host.state == "runs":
                for rank in host.ranks:
                    if not (host.bad.get("lost") and rank in self._culprit):
                        host.wire.send_line(self._answer(host, rank))
        self._step += 1

    def _hear(self) -> list[tuple[FakeHost, dict[str, Any]]]:
        found: list[tuple[FakeHost, dict[str, Any]]] = []
        for key, _ in self._selector.select(0.01):
            host = key.data
            messages = host.wire.receive()
            if host.wire.ended:
                self._selector.unregister(host.wire.socket)
            if messages:
                now_s = time.monotonic()
                self.longest_pause_s = max(self.longest_pause_s, now_s - (host.heard_s or now_s))
                host.heard_s = now_s
            self.received_bytes += sum(len(line_of(message)) for message in messages)
            found += [(host, message) for message in messages]
        return found

    def _beat(self, rank: int) -> dict[str, Any]:
        hangs = rank in self._culprit and self._hosts[rank // self._n_local].bad.get("hangs")
        return {
            "step": f"in step {self._step}",
            "place": "augment.py:12 augment" if hangs else "megagpt/parallel/collectives.py:35 all_reduce",
            "collective": None if hangs else "all_reduce",
            "still_s": 0.05,
            "steps_done": self._step,
            "busy_s": 0.01 * self._step,
            "waiting_s": 0.02 * self._step,
            "pid": 10_000 + rank,
        }

    def _answer(self, host: FakeHost, rank: int) -> bytes:
        """The bad rank's neighbours wait for it on their host; all others for those, over the data axis."""
        beat = self._beat(rank)
        members = (
            host.ranks
            if self._culprit.start in host.ranks
            else range(rank % self._n_local, self._n_ranks, self._n_local)
        )
        spans = needs(rank, "all_reduce", members) if beat["collective"] else ()
        answer = {
            "collective": beat["collective"],
            "waits_for": [[span.start, span.stop, span.step] for span in spans],
            "stack": STACK,
            "flight_recorder": RECORD,
        }
        return json.dumps({"rank": rank, "beat": beat, "answer": answer}).encode() + b"\n"

    @property
    def _n_ranks(self) -> int:
        return self._n_hosts * self._n_local
