"""The watch over the ranks: when one dies, stops or hangs, all end soon, and one message names it.

In every rank a thread tells a process of its machine (host.py) once a second that it lives, in which step it is and
where; it looks 20 times a second. That process tells the judge (judge.py), of all ranks of its machine at once, and
answers with a pulse; the judge ends all when one is lost. A connection that ends without a farewell is a death, known
at once on every host; a silence is a stop, a cut cable, or C code that holds Python's lock; a rank that has not moved
for long waits for one that hangs.

On a GPU the host thread runs ahead of the device and stands still where it reads a result: a hang is found by that, and
torch's flight recorder tells which collective the device waits in. Untried with NCCL on several GPUs.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import selectors
import socket
import subprocess
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megagpt.errors import EXIT_PEER_LOST, SILENT_S
from megagpt.processes.watch.call_site import Activity, call_site, enqueued, flight_record, waits_for
from megagpt.processes.watch.last_words import end_process, say
from megagpt.processes.watch.limits import BEAT_S, START_S, Limits
from megagpt.processes.watch.office import Errand, open_office
from megagpt.processes.watch.verdict import needs
from megagpt.processes.watch.wire import Wire

LOOK_S = 0.05  # between two looks at the busy thread
DOUBT_S = 3.0  # how long a rank that fails waits for the news that it fails because another one is lost
ANSWER_S = 5.0  # how long the thread may take, on a busy machine, to do what the main one asks for
JUDGE_KEY, HOST_KEY = "megagpt/judge", "megagpt/watch/{}"  # of the store; of the host with that number


class Watch:
    """What the main thread has to do with it. In a program of one process there is nothing to watch."""

    def __init__(self, thread: WatchThread | None = None, judge: subprocess.Popen[bytes] | None = None) -> None:
        """judge: its process; on rank 0."""
        self._thread, self._judge = thread, judge
        self._activity = thread.activity if thread else Activity()

    def step(self, step: int) -> AbstractContextManager[None]:
        """Mark a training step (the first is 1) while it lasts, for messages and for finding slow ranks."""
        return self._activity.step(step)

    def notes(self) -> list[str]:
        """What is worth telling the user since the last call, such as a slow rank; on rank 0 only."""
        found = []
        with suppress(queue.Empty):
            while self._thread:
                found.append(self._thread.notes.get_nowait())
        return found

    def write_to(self, folder: Path) -> None:
        """Where faults are written down from now on."""
        if self._thread:
            self._thread.folder = folder.absolute()

    def leave(self) -> None:
        """Take leave in good order; rank 0 waits until all have, and watches over them meanwhile."""
        if self._thread:
            self._thread.leave()
        if self._judge and (code := self._judge.wait()):  # another rank has not left, and was lost, or the judge was
            end_process(code if code > 0 else EXIT_PEER_LOST)

    def doubt(self) -> None:
        """Wait a little whether the error that is handled comes from the loss of another rank; if so, end here."""
        if self._thread:
            self._thread.doubt()

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
    Comm: none over a group. The first rank of each machine starts a process there, whose port, on the machine alone, it
    names in the store to the others there; rank 0 the judge as well, to whose port the other machines' processes come.
    A port is closed again when all have come.
    """
    if pp * dp * tp == 1:
        return Watch()
    by_machine: dict[str, list[int]] = {}
    for each, machine in enumerate(machines):
        by_machine.setdefault(machine, []).append(each)
    hosts = list(by_machine.values())
    number = next(i for i, ranks in enumerate(hosts) if rank in ranks)
    office = None
    if rank == hosts[number][0]:
        office = _open_office(store, number, hosts, pp, dp, tp, limits)
    address = json.loads(store.get(HOST_KEY.format(number)))
    connection = socket.create_connection(("127.0.0.1", address["port"]), timeout=limits.heartbeat_timeout_s)
    judge = office if rank == 0 else None
    thread = WatchThread(rank, hosts[number].index(rank), Wire(connection), address["token"], limits, judge)
    thread.start()
    thread.heard.wait(START_S)  # from now on a lost rank has somebody who names it
    return Watch(thread, judge)


def _open_office(
    store: dist.Store, number: int, hosts: list[list[int]], pp: int, dp: int, tp: int, limits: Limits
) -> subprocess.Popen[bytes]:
    """Start this machine's process of the watch, and say in the store where it is."""
    listener = _listen("127.0.0.1", len(hosts[number]))
    judge_listener = None
    if number == 0:
        host = "127.0.0.1" if len(hosts) == 1 else os.environ["MASTER_ADDR"]
        judge_listener = _listen(host, len(hosts))
        judge = {"host": host, "port": judge_listener.getsockname()[1], "token": secrets.token_hex(16)}
        store.set(JUDGE_KEY, json.dumps(judge))
    else:
        judge = json.loads(store.get(JUDGE_KEY))
    errand = Errand(
        number=number,
        token=judge["token"],
        listener=listener.fileno(),
        judge=(judge["host"], judge["port"]),
        judge_listener=judge_listener.fileno() if judge_listener else None,
        hosts=hosts,
        pp=pp,
        dp=dp,
        tp=tp,
        limits=limits,
        compares=not torch.cuda.is_available(),
    )
    office = open_office(errand)
    store.set(HOST_KEY.format(number), json.dumps({"port": listener.getsockname()[1], "token": judge["token"]}))
    for each in (listener, judge_listener):
        if each:
            each.close()
    return office


def _listen(host: str, n: int) -> socket.socket:
    """A free port on the address that the others know this machine by; on all, if that is known by another one here."""
    family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    # Debian writes a machine's own name into /etc/hosts as 127.0.1.1, where no other machine could reach it.
    is_local = str(address[0]).startswith("127.") or address[0] == "::1"
    if is_local and host != "127.0.0.1":
        return socket.create_server(("", 0), family=family, backlog=n)
    return socket.create_server((str(address[0]), 0), family=family, backlog=n)


class WatchThread(threading.Thread):
    """Looks at the busy thread, tells this machine's process of the watch, and ends the process when it is told to."""

    def __init__(
        self,
        rank: int,
        number: int,
        wire: Wire,
        token: str,
        limits: Limits,
        judge: subprocess.Popen[bytes] | None = None,
    ) -> None:
        """number: of the rank on its machine. judge: its process, on rank 0."""
        super().__init__(name="watch", daemon=True)
        self.activity = Activity()
        self.folder: Path | None = None  # where faults are written down, once it is known
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()  # what is worth telling the user meanwhile
        self._rank, self._wire, self._timeout_s, self._judge = rank, wire, limits.heartbeat_timeout_s, judge
        self._clock = limits.clock()
        self._hello = {"token": token, "number": number, "host": socket.gethostname()}
        self._told_folder: Path | None = None
        self._leaves = threading.Event()  # the main thread wants it to take leave
        self._failure: int | None = None  # the main thread wants it to say that this rank failed
        self.heard = threading.Event()  # this machine's process of the watch has spoken
        self._condemned = threading.Event()  # this process will be ended
        self._acknowledged = threading.Event()  # this process speaks for all
        self._heard_s = self._clock.now_s() + START_S

    # Called by the main thread

    def leave(self) -> None:
        self._leaves.set()
        self.join(ANSWER_S)

    def doubt(self) -> None:
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
                if self.folder != self._told_folder:
                    self._told_folder = self.folder
                    self._wire.send(folder=str(self.folder))
                if self._wire.ended or now_s - self._heard_s > self._timeout_s:
                    return self._watch_is_lost()
        self._wire.send(beat=self.activity.report(), bye=True)
        self._wire.close()

    def _obey(self, message: dict[str, Any]) -> None:
        self._heard_s = self._clock.now_s()
        self.heard.set()
        if "note" in message:
            self.notes.put(message["note"])
        if "where" in message:
            self._condemned.set()
            self.activity.look(self._clock.now_s())
            self._wire.send(beat=self.activity.report(), answer=self._answer())
        if "verdict" in message:
            self._end(**message["verdict"])

    def _answer(self) -> dict[str, Any]:
        """Where this rank is, and whom it waits for."""
        collective = self.activity.report()["collective"]
        others = waits_for()
        if others is None and (collective or torch.cuda.is_available()):
            collective, others = enqueued() or (collective, None)
        spans = needs(self._rank, collective, others) if others else ()
        return {
            "collective": collective,
            "waits_for": [[span.start, span.stop, span.step] for span in spans],
            "stack": call_site().stack,
            "flight_recorder": flight_record(),
        }

    def _end(self, by: int | None, exit: int, delay_s: float) -> None:
        self._acknowledged.set()
        if by != self._rank:
            self._condemned.set()
            time.sleep(delay_s)
            end_process(exit)

    def _watch_is_lost(self) -> None:
        """This machine's process of the watch is gone; the judge says so, unless it was killed as well."""
        if self._acknowledged.is_set():  # it ended because this rank has failed, which says so itself
            return
        self._condemned.set()
        time.sleep(SILENT_S)
        if self._judge and (self._judge.poll() or 0) < 0:
            say(f"the watch over the ranks died on {socket.gethostname()}; start again with --auto-resume")
        end_process(EXIT_PEER_LOST)
