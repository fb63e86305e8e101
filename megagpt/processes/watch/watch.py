"""The watch over the ranks: when one dies, stops or hangs, all end soon, and one message names it.

In every rank a thread tells the judge (a thread of rank 0: judge.py) once a second that it lives, in which step it is
and where; it looks 20 times a second. The judge answers with a pulse, and ends all when one is lost. A connection that
ends without a farewell is a death, known at once on every host; a silence is a stop, a cut cable, or C code that holds
Python's lock; a rank that has not moved for long waits for one that hangs.

On a GPU the host thread runs ahead of the device and stands still where it reads a result: a hang is found by that, and
torch's flight recorder tells which collective the device waits in. Untried with NCCL on several GPUs.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import socket
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from queue import Empty
from typing import Any

import torch
import torch.distributed as dist

from megagpt.errors import EXIT_PEER_LOST, SILENT_S
from megagpt.parallel.mesh import rank_name
from megagpt.processes.watch.call_site import Activity, call_site, enqueued, failed_at, flight_record, waits_for
from megagpt.processes.watch.judge import BEAT_S, Judge, Limits, Wire, end_process, say, write_down
from megagpt.processes.watch.verdict import RankView, describe

LOOK_S = 0.05  # between two looks at the busy thread
DOUBT_S = 3.0  # how long a rank that fails waits for the news that it fails because another one is lost
ANSWER_S = 1.0  # how long the thread may take to do what the main one asks for
STORE_KEY = "megagpt/judge"


class Watch:
    """What the main thread has to do with it. In a program of one process there is nothing to watch."""

    def __init__(self, thread: WatchThread | None = None, judge: Judge | None = None) -> None:
        self._thread, self._judge = thread, judge
        self._activity = thread.activity if thread else Activity()

    def step(self, step: int) -> AbstractContextManager[None]:
        """Mark a training step (the first is 1) while it lasts, for messages and for finding slow ranks."""
        return self._activity.step(step)

    def notes(self) -> list[str]:
        """What is worth telling the user since the last call, such as a slow rank; on rank 0 only."""
        found = []
        with suppress(Empty):
            while self._judge:
                found.append(self._judge.notes.get_nowait())
        return found

    def write_to(self, folder: Path) -> None:
        """Where faults are written down from now on."""
        for thread in (self._thread, self._judge):
            if thread:
                thread.folder = folder

    def leave(self) -> None:
        """Take leave in good order; rank 0 waits until all have, and watches over them meanwhile."""
        if self._thread:
            self._thread.leave()
        if self._judge:
            self._judge.join()

    def doubt(self, error: BaseException) -> None:
        """Wait a little whether an error comes from the loss of another rank; if so, this process ends here."""
        if self._thread:
            self._thread.doubt(error)

    def fail(self, exit_code: int) -> None:
        """Say that this rank ends now and tells the user why: the others end silently, after it, with that code.

        Does not return if another rank failed first, which speaks.
        """
        if self._thread:
            self._thread.fail(exit_code)


def start_watch(
    store: dist.Store, rank: int, *, pp: int, dp: int, tp: int, machines: Sequence[str], limits: Limits
) -> Watch:
    """Watch over the pp * dp * tp processes of this run.

    store: of all of them. machines: `machine_id()` of each rank.
    Comm: none over a group; rank 0 opens a port (on the machine alone, if all ranks are on it; closed again when all
    have come) and names it in the store, the others connect to it.
    """
    n_ranks = pp * dp * tp
    if n_ranks == 1:
        return Watch()
    judge = None
    if rank == 0:
        one_machine = len(set(machines)) == 1
        host = "127.0.0.1" if one_machine else os.environ["MASTER_ADDR"]
        listener, token = _listen(host, n_ranks), secrets.token_hex(16)
        names = [rank_name(r, dp=dp, tp=tp) for r in range(n_ranks)]
        stages = [range(stage * dp * tp, (stage + 1) * dp * tp) for stage in range(pp)]
        on_gpu = torch.cuda.is_available()
        judge = Judge(listener, token, names, [] if on_gpu else stages, limits)
        judge.start()
        store.set(STORE_KEY, json.dumps({"host": host, "port": listener.getsockname()[1], "token": token}))
    address = json.loads(store.get(STORE_KEY))
    connection = socket.create_connection((address["host"], address["port"]), timeout=limits.heartbeat_timeout_s)
    thread = WatchThread(rank, Wire(connection), address["token"], limits, judges=judge is not None)
    thread.start()
    return Watch(thread, judge)


def _listen(host: str, n_ranks: int) -> socket.socket:
    """A free port on the address that the others know this machine by; on all, if that is known by another one here."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    # Debian writes a machine's own name into /etc/hosts as 127.0.1.1, where no other machine could reach it.
    is_local = str(address[0]).startswith("127.") or address[0] == "::1"
    if is_local and host != "127.0.0.1":
        return socket.create_server(("", 0), family=family, backlog=n_ranks)
    return socket.create_server((str(address[0]), 0), family=family, backlog=n_ranks)


class WatchThread(threading.Thread):
    """Looks at the busy thread, tells the judge, and ends the process when it is told to or the judge is lost."""

    def __init__(self, rank: int, wire: Wire, token: str, limits: Limits, judges: bool) -> None:
        """judges: whether the judge lives in this process; then it is the judge that ends it."""
        super().__init__(name="watch", daemon=True)
        self.activity = Activity()
        self.folder: Path | None = None
        self._rank, self._wire, self._timeout_s, self._judges = rank, wire, limits.heartbeat_timeout_s, judges
        self._clock = limits.clock()
        self._hello = {"token": token, "rank": rank, "host": socket.gethostname(), "machine": machine_id()}
        self._peers: list[dict[str, Any]] = []
        self._rank_0 = RankView(0, "rank 0 (pipe 0, data 0, model 0)")
        self._leaves = threading.Event()  # the main thread wants it to take leave
        self._failure: int | None = None  # the main thread wants it to say that this rank failed
        self._condemned = threading.Event()  # this process will be ended
        self._acknowledged = threading.Event()  # this process speaks for all
        self._heard_s = self._clock.now_s()

    # Called by the main thread

    def leave(self) -> None:
        self._leaves.set()
        self.join(ANSWER_S)

    def doubt(self, error: BaseException) -> None:
        self.activity.failed_at = failed_at(error)
        if self._condemned.wait(DOUBT_S):
            self._wait_for_the_end()

    def fail(self, exit_code: int) -> None:
        self._failure = exit_code
        self._acknowledged.wait(ANSWER_S)
        if self._condemned.is_set():
            self._wait_for_the_end()

    def _wait_for_the_end(self) -> None:
        while True:
            time.sleep(1.0)

    # The thread

    def run(self) -> None:
        try:
            self._watch()
        except Exception:  # a watch that is broken must not look like one that finds nothing
            traceback.print_exc()
            end_process(1)

    def _watch(self) -> None:
        self._wire.send(**self._hello, pid=os.getpid())
        with selectors.DefaultSelector() as selector:
            selector.register(self._wire.socket, selectors.EVENT_READ)
            next_beat_s = 0.0
            while not self._leaves.is_set():
                for message in self._wire.receive() if selector.select(LOOK_S) else []:
                    self._obey(message)
                now_s = self._clock.now_s()
                self.activity.look(now_s)
                if now_s >= next_beat_s:
                    next_beat_s = now_s + BEAT_S
                    self._wire.send(beat=self.activity.report())
                if self._failure is not None:
                    self._wire.send(failed=self._failure)
                    self._failure = None
                if self._wire.ended or now_s - self._heard_s > self._timeout_s:
                    return self._judge_is_lost()
        self._wire.send(beat=self.activity.report(), bye=True)
        self._wire.close()

    def _obey(self, message: dict[str, Any]) -> None:
        self._heard_s = self._clock.now_s()
        if "peers" in message:
            self._peers = message["peers"]
            self._rank_0 = RankView(**message["pulse"])
        elif "pulse" in message:
            self._rank_0 = RankView(**message["pulse"])
        if "where" in message:
            self._condemned.set()
            self.activity.look(self._clock.now_s())
            self._wire.send(beat=self.activity.report(), answer=self._answer(message["where"]))
        if "verdict" in message:
            self._end(**message["verdict"])

    def _answer(self, silent: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Where this rank is and whom it waits for; and what became of silent processes of this machine."""
        collective = self.activity.report()["collective"]
        needs = waits_for()
        if needs is None and (collective or torch.cuda.is_available()):
            collective, needs = enqueued() or (collective, None)
        here = self._hello["machine"]
        return {
            "collective": collective,
            "waits_for": needs or [],
            "stack": (self.activity.failed_at or call_site()).stack,
            "flight_recorder": flight_record(),
            "seen": [(p["pid"], process_state(p["pid"])) for p in silent if p["machine"] == here],
        }

    def _end(self, by: int | None, exit: int, delay_s: float) -> None:
        if by == self._rank:
            self._acknowledged.set()
            return
        self._condemned.set()
        self._acknowledged.set()
        if not self._judges:
            time.sleep(delay_s)
            end_process(exit)

    def _judge_is_lost(self) -> None:
        """Rank 0 is gone: the first rank on each machine says so."""
        if self._acknowledged.is_set():  # it ended because this rank has failed, which says so itself
            return
        self._condemned.set()
        judge, timeout_s = self._rank_0, self._timeout_s
        here = self._hello["machine"]
        near = [p for p in self._peers if p["machine"] == here]
        judge.state = "died" if self._wire.ended else "silent"
        if not self._wire.ended and any(p["rank"] == 0 for p in near) and process_state(judge.pid) == "stopped":
            judge.state = "stopped"
        running = [p["rank"] for p in near if p["rank"] and process_state(p["pid"]) in ("runs", "unknown")]
        if self._rank == min(running, default=self._rank):
            machines = list(dict.fromkeys(p["machine"] for p in self._peers if p["rank"]))
            if here in machines:  # the first machine's launcher may end all before another one's rank speaks
                time.sleep(0.5 * min(machines.index(here), 6))
            me = RankView(self._rank, f"rank {self._rank}", self._hello["host"])
            report = self.activity.report()
            me.step, me.place, me.collective = report["step"], report["place"], report["collective"]
            message = describe([judge, me], timeout_s)
            say(message)
            write_down(self.folder, message, [judge, me], {})
            time.sleep(2 * BEAT_S)  # the others, who notice a little later, must see that this rank lives to speak
        else:
            time.sleep(SILENT_S)
        end_process(EXIT_PEER_LOST)


def machine_id() -> str:
    """The same for two processes that see each other's process ids and local addresses, and only then."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return " ".join([boot, os.readlink("/proc/self/ns/pid"), os.readlink("/proc/self/ns/net")])
    except OSError:  # not Linux
        return socket.gethostname()


def process_state(pid: int) -> str:
    """What the system says of a process of this machine: "gone", "stopped", "runs" or, without /proc, "unknown"."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "gone" if Path("/proc/self/stat").exists() else "unknown"
    letter = status.rpartition(")")[2].split()[0]
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped"}.get(letter, "runs")
