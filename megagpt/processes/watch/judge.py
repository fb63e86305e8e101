"""The judge: a thread of rank 0 that hears every rank once a second, and ends all of them when one is lost.

It asks all for their places first, says one line that names the cause, writes down what it knows, and sends the
verdict. What the ranks do with that: watch.py.
"""

from __future__ import annotations

import json
import os
import queue
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagpt.errors import EXIT_PEER_LOST, SILENT_S
from megagpt.files import os_reason
from megagpt.processes.watch.awake import AwakeClock
from megagpt.processes.watch.door import Door, Hello
from megagpt.processes.watch.verdict import WINDOW_S, RankView, SlowRanks, Work, describe

MAX_LINE_BYTES = 1 << 20  # more than any message here: what is longer is none of ours
SEND_TIMEOUT_S = 2.0


class Wire:
    """One end of a connection. Only one thread may use it."""

    def __init__(self, connection: socket.socket, unread: bytes = b"") -> None:
        """unread: what has been taken from the connection already."""
        self.socket = connection
        self.ended = False  # nothing more will come
        self._unread = unread
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SEND_TIMEOUT_S)

    def send(self, **message: Any) -> None:
        """Send one message; to an end that is gone, or does not read, it is lost: `ended` and silence tell."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # who depends on the answer watches for `ended` and for silence

    def receive(self) -> list[dict[str, Any]]:
        """The messages that are there. Call it when the socket is readable; it sets `ended` at the end."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        lines = (self._unread + data).split(b"\n")
        self._unread = lines.pop()
        self.ended = not data or len(self._unread) > MAX_LINE_BYTES
        messages: list[dict[str, Any]] = []
        for line in lines:
            try:
                messages.append(dict(json.loads(line)))
            except (ValueError, TypeError, RecursionError):  # not one of ours
                self.ended = True
                break
        return messages

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


BEAT_S = 1.0  # between two signs of life
TURN_S = 0.1  # between two looks at the clock
ANSWER_S = 0.5  # how long the answers to "where are you" may take
HANG_UP_S = 2.0  # how long the ranks may take to end, before rank 0 does


@dataclass(frozen=True)
class Limits:
    """When a rank is lost or slow.

    heartbeat_timeout_s: without a sign of life. progress_timeout_s: without a move of any thread that waits.
    slow_rank_factor: times the work of its peers in a step; 0: never. window_s: over which that is compared.
    Times are those of `clock`.
    """

    heartbeat_timeout_s: float = 60.0
    progress_timeout_s: float = 600.0
    slow_rank_factor: float = 1.5
    window_s: float = WINDOW_S

    def clock(self) -> AwakeClock:
        """A clock by which a job that was paused as a whole has lost nobody."""
        return AwakeClock(self.heartbeat_timeout_s / 4)


class Judge(threading.Thread):
    """Owns a connection to every rank, rank 0 included, and the door by which they come in."""

    def __init__(
        self, listener: socket.socket, token: str, names: Sequence[str], stages: Sequence[Sequence[int]], limits: Limits
    ) -> None:
        """names: of the ranks, for messages. stages: the ranks of each pipeline stage."""
        super().__init__(name="judge", daemon=True)
        self.folder: Path | None = None  # where faults are written down, once it is known
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()  # what is worth telling the user meanwhile
        self.limits = limits
        self._door: Door | None = Door(listener, token, len(names))  # until all are in
        self._clock = limits.clock()
        self._views = [RankView(rank, name) for rank, name in enumerate(names)]
        self._machines: dict[int, str] = {}
        self._wires: dict[int, Wire] = {}
        self._heard_s = dict.fromkeys(range(len(names)), self._clock.now_s())
        self._work: dict[int, Work] = {}
        self._slow = SlowRanks(stages, limits.slow_rank_factor, limits.window_s)
        self._failed: tuple[int, int] | None = None  # rank, exit code for the others
        self._answers: dict[int, dict[str, Any]] = {}
        self._selector = selectors.DefaultSelector()
        self._next_pulse_s = 0.0

    def run(self) -> None:
        try:
            self._preside()
        except Exception:  # a watch that is broken must not look like one that finds nothing
            traceback.print_exc()
            end_process(1)

    def _preside(self) -> None:
        while any(view.state != "left" for view in self._views):
            self._hear(TURN_S)
            now_s = self._clock.now_s()
            self._pulse(now_s)
            if self._failed:
                return self._end_silently(*self._failed)
            self._find_silent(now_s)
            if any(view.state not in ("runs", "left") or self._hangs(view) for view in self._views):
                return self._end()
            for slow in self._slow.update(now_s, self._work):
                view = self._views[slow.rank]
                self.notes.put(f"{view.name} on {view.host} is slow: {slow}")
        self._close()

    def _hangs(self, view: RankView) -> bool:
        """Whether a rank waits for too long: in its place, or at the end (rank 0) for the others to end as well."""
        if view.state == "left":
            waits_s = self._clock.now_s() - self._heard_s[0] if view.rank == 0 else 0.0
        else:
            waits_s = view.still_s
        return waits_s > self.limits.progress_timeout_s

    def _find_silent(self, now_s: float) -> None:
        for view in self._views:
            if view.state == "runs" and now_s - self._heard_s[view.rank] > self.limits.heartbeat_timeout_s:
                view.state = "silent"

    # Hearing

    def _hear(self, patience_s: float) -> None:
        """Take in what has come, or comes within that time."""
        if self._door:
            for connection, hello, rest in self._door.admit(self._clock.now_s()):
                self._welcome(Wire(connection, rest), hello)
            if len(self._wires) == len(self._views):
                self._open_session()
        for key, _ in self._selector.select(patience_s):
            self._read(key.data, self._wires[key.data])

    def _read(self, rank: int, wire: Wire) -> None:
        for message in wire.receive():
            self._take(rank, message)
        if wire.ended:
            self._selector.unregister(wire.socket)
            wire.close()
            if self._views[rank].state in ("runs", "silent"):
                self._views[rank].state = "died"

    def _welcome(self, wire: Wire, hello: Hello) -> None:
        """A rank has come; a second one of its number is none."""
        if hello.rank in self._wires:
            return wire.close()
        self._wires[hello.rank], self._machines[hello.rank] = wire, hello.machine
        self._selector.register(wire.socket, selectors.EVENT_READ, hello.rank)
        view = self._views[hello.rank]
        view.host, view.pid = hello.host, hello.pid

    def _open_session(self) -> None:
        """All are in: close the door, and tell each of all."""
        assert self._door
        self._door.close()
        self._door = None
        peers = [{"rank": v.rank, "pid": v.pid, "machine": self._machines[v.rank]} for v in self._views]
        self._tell(peers=peers, pulse=asdict(self._views[0]))

    def _take(self, rank: int, message: dict[str, Any]) -> None:
        """A message of a known rank: a beat, an answer, a failure or its farewell."""
        view = self._views[rank]
        self._heard_s[rank] = self._clock.now_s()
        if "failed" in message:
            self._failed = self._failed or (rank, message["failed"])
        if "bye" in message:
            view.state = "left"
            self._work.clear()  # nothing to compare any more
        if "beat" in message:
            beat = message["beat"]
            view.step, view.place = beat["step"], beat["place"]
            view.collective, view.still_s = beat["collective"], beat["still_s"]
            self._work[rank] = Work(beat["steps_done"], beat["busy_s"], beat["waiting_s"])
        if "answer" in message:
            self._answers[rank] = message["answer"]

    # Speaking

    def _pulse(self, now_s: float) -> None:
        """Tell all that rank 0 lives, and where: they need it should it be lost."""
        if now_s >= self._next_pulse_s:
            self._next_pulse_s = now_s + BEAT_S
            self._tell(pulse=asdict(self._views[0]))

    def _tell(self, **message: Any) -> None:
        for rank, wire in self._wires.items():
            if self._views[rank].state == "runs" and not wire.ended:
                wire.send(**message)

    def _end_silently(self, rank: int, code: int) -> None:
        """A rank has failed and speaks for itself: the others end without a word, after it."""
        self._tell(verdict={"by": rank, "exit": code, "delay_s": SILENT_S})
        if rank == 0:
            return self._close()
        time.sleep(SILENT_S)
        end_process(code)

    def _end(self) -> None:
        self._question()
        limits = self.limits
        lost = any(view.state in ("died", "stopped", "silent") for view in self._views)
        timeout_s = limits.heartbeat_timeout_s if lost else limits.progress_timeout_s
        message = describe(self._views, timeout_s)
        say(message)
        write_down(self.folder, message, self._views, self._answers)
        self._tell(verdict={"by": None, "exit": EXIT_PEER_LOST, "delay_s": 0.0})
        deadline_s = time.monotonic() + HANG_UP_S
        while any(v.state == "runs" for v in self._views[1:]) and time.monotonic() < deadline_s:
            self._hear(TURN_S)
        end_process(EXIT_PEER_LOST)

    def _question(self) -> None:
        """Ask all for their places, and what they see of the silent ones on their machine."""
        silent = [v for v in self._views if v.state == "silent"]
        self._tell(where=[{"machine": self._machines.get(v.rank), "pid": v.pid} for v in silent])
        deadline_s = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline_s and not all(
            v.rank in self._answers or v.state != "runs" for v in self._views
        ):
            self._hear(TURN_S)
        for view in self._views:
            answer = self._answers.get(view.rank, {})
            view.waits_for, view.stack = answer.get("waits_for", ()), answer.get("stack", ())
            view.collective = answer.get("collective", view.collective)
        if self._views[0].state == "left" and not any(0 in view.waits_for for view in self._views):
            self._views[0].waits_for = [view.rank for view in self._views if view.state != "left"]
        for view in silent:
            seen = {state for answer in self._answers.values() for pid, state in answer["seen"] if pid == view.pid}
            view.state = "died" if "gone" in seen else "stopped" if "stopped" in seen else view.state

    def _close(self) -> None:
        for wire in self._wires.values():
            wire.close()
        if self._door:
            self._door.close()
        self._selector.close()


def say(message: str) -> None:
    """Print an error in one piece, past Python's buffers: the main thread may hold them."""
    _to_stderr(f"error: {message}\n")


def write_down(
    folder: Path | None, message: str, views: Sequence[RankView], answers: dict[int, dict[str, Any]]
) -> None:
    """Keep what is known of a fault: folder/lost-TIME.json."""
    if folder is None:
        return
    known = {
        "message": message,
        "ranks": [asdict(view) for view in views],
        "flight_recorder": {rank: answer.get("flight_recorder") for rank, answer in answers.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"lost-{time.strftime('%Y%m%d-%H%M%S')}.json").write_text(json.dumps(known, indent=1))
    except OSError as error:
        _to_stderr(f"note: could not write to {folder} ({os_reason(error)})\n")


def _to_stderr(line: str) -> None:
    with suppress(OSError):  # its reader may have gone, and that must not be what ends this process
        os.write(2, line.encode(errors="backslashreplace"))


def end_process(code: int) -> None:
    """End this process from any thread, whatever the main one does."""
    # Flushing may wait for ever: for the main thread's lock on a buffer, or for a reader.
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(timeout=1.0)
    os._exit(code)


def _flush() -> None:
    files: Sequence[Callable[[], None]] = (sys.stdout.flush, sys.stderr.flush)
    for flush_file in files:
        flush_file()
