"""The host's part of the watch: a process that hears the ranks of one machine, and tells the judge of them all at once.

It finds who died, was stopped, is silent or stands still; what follows is the judge's to decide (judge.py). When the
judge itself is lost, its deputy says so, the second host, to which the others are connected from the start. Where that
is lost as well each host speaks for itself, one after the other: the first launcher that ends all leaves no need.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.errors import EXIT_PEER_LOST, SILENT_S
from megagpt.processes.watch.last_words import say, write_down
from megagpt.processes.watch.limits import BEAT_S, HANG_UP_S, START_S, TURN_S, Limits
from megagpt.processes.watch.machine import process_state
from megagpt.processes.watch.verdict import RankView, describe
from megagpt.processes.watch.wire import Circle, Wire

ANSWER_S = 1.0  # how long the ranks of a host may take to say where they are
FIRST_SPEAKS_S = 0.5  # between two hosts that say that the judge is lost
MAX_DELAYS = 6
WORD_S = 2.0  # how long the deputy waits for what the judge's own host knows, when the judge is lost
CONNECT_S = 2.0
JUDGE, DEPUTY = -1, -2  # their numbers among those that are heard
DEPUTY_HOST = 1


@dataclass
class Local:
    """A rank of this machine. state: as of `RankView`. answer: where it says that it is, once it was asked."""

    rank: int
    heard_s: float
    pid: int = 0
    beat: dict[str, Any] = field(default_factory=dict)
    state: str = "runs"
    answer: dict[str, Any] | None = None


class HostWatch:
    """Owns a connection to each rank of its machine, one to the judge, and one to the deputy or, as that, to all."""

    def __init__(
        self,
        number: int,
        n_hosts: int,
        names: Mapping[int, str],
        listener: socket.socket,
        token: str,
        judge: Wire,
        limits: Limits,
    ) -> None:
        """number: of the host in the run. names: of its ranks, for messages. token: of the run."""
        self._number, self._names, self._judge, self._limits = number, names, judge, limits
        self._hello = {"token": token, "number": number, "host": socket.gethostname(), "pid": os.getpid()}
        self._circle = Circle(listener, token, range(len(names)))
        self._circle.add(JUDGE, judge)
        self._clock = limits.clock()
        self._heard_s, self._next_look_s, self._next_beat_s = self._clock.now_s() + START_S, 0.0, 0.0
        self._ranks = [Local(rank, self._clock.now_s() + START_S) for rank in names]
        self._flags: dict[str, bool] = {}  # as the judge was told last
        # What is lost with the judge: itself, and its host's ranks.
        self._judges = [RankView(-1, "the judge of the watch", step="")]
        self._judge_state = ""  # what its own host says of it, once it is lost
        self._folder: Path | None = None
        self._delay_s: float | None = None  # of the verdict, once there is one
        judge.send(**self._hello)
        self._n_hosts = n_hosts
        self._others = self._open_door(token) if number == DEPUTY_HOST else None

    def _open_door(self, token: str) -> Circle:
        """Be the deputy: let the other hosts come."""
        address = self._judge.socket.getsockname()[0]
        listener = socket.create_server((address, 0), family=self._judge.socket.family, backlog=self._n_hosts)
        self._judge.send(deputy=(address, listener.getsockname()[1]))
        return Circle(listener, token, {*range(self._n_hosts)} - {DEPUTY_HOST})

    def run(self) -> None:
        """Until all ranks of this machine have left, or a verdict has ended them."""
        while any(local.state != "left" for local in self._ranks):
            self._turn()
            if self._delay_s is not None:
                break
            if self._judge.ended or self._clock.now_s() - self._heard_s > self._limits.heartbeat_timeout_s:
                self._judge_is_lost()
                break
        deadline_s = time.monotonic() + (self._delay_s or 0.0) + HANG_UP_S
        while self._running and time.monotonic() < deadline_s:
            self._turn()
        self._judge.send(over=True)
        self._circle.close()
        if self._others:
            self._others.close()

    def _turn(self) -> None:
        for number, message in self._circle.hear(TURN_S, self._clock.now_s()):
            if number in (JUDGE, DEPUTY):
                self._obey(message, number)
            else:
                self._take(self._ranks[number], message)
        for number, message in self._others.hear(0.0, self._clock.now_s()) if self._others else ():
            if number == 0:
                self._judge_state = message.get("judge", self._judge_state)
        now_s = self._clock.now_s()
        if now_s >= self._next_look_s and self._delay_s is None:
            self._next_look_s = now_s + BEAT_S
            self._look(now_s)

    @property
    def _running(self) -> list[Local]:
        return [local for local in self._ranks if local.state == "runs"]

    def _tell(self, locals_: Sequence[Local], **message: Any) -> None:
        self._circle.tell([self._ranks.index(local) for local in locals_], **message)

    # What ranks say

    def _take(self, local: Local, message: dict[str, Any]) -> None:
        local.heard_s = self._clock.now_s()
        if "hello" in message:
            local.pid = message["hello"].pid
        if "beat" in message:
            local.beat = message["beat"] | {"pid": local.pid}
        local.answer = message.get("answer", local.answer)
        if "folder" in message:
            self._folder = Path(message["folder"])
        if "bye" in message:
            local.state = "left"
        if message.keys() & {"answer", "failed", "bye", "folder"}:
            self._judge.send(**message | {"rank": local.rank, "beat": local.beat})
        if "gone" in message and local.state == "runs":
            self._lose(local, "died")

    def _lose(self, local: Local, state: str) -> None:
        local.state = state
        self._judge.send(rank=local.rank, lost=state, beat=local.beat | {"pid": local.pid})

    def _look(self, now_s: float) -> None:
        """Look for the silent, tell the judge in a few words, and the ranks that this process lives.

        Where all ranks were stopped together somebody paused the job; none has lost another one by that.
        """
        silent = [local for local in self._running if now_s - local.heard_s > 2 * BEAT_S]
        states = {local.rank: process_state(local.pid) for local in silent if local.pid}
        stopped = [local for local in silent if states.get(local.rank) == "stopped"]
        paused = len(stopped) == len(self._running) > 0
        for local in silent:
            if states.get(local.rank) == "gone":
                self._lose(local, "died")
            elif paused:
                local.heard_s = now_s - 3 * BEAT_S  # silent, but for no time that counts
            elif now_s - local.heard_s > self._limits.heartbeat_timeout_s:
                self._lose(local, "stopped" if local in stopped else "silent")
        hangs = any(local.beat.get("still_s", 0.0) > self._limits.progress_timeout_s for local in self._running)
        self._beat(now_s, silent=bool(silent), paused=paused, hangs=hangs)
        self._pulse(stopped)

    def _pulse(self, stopped: Sequence[Local] = ()) -> None:
        """Tell ranks that this process lives, once it knows of the judge what it must know when that is lost."""
        if self._judges[0].pid:
            self._tell([local for local in self._running if local not in stopped], pulse=True)

    def _beat(self, now_s: float, **flags: bool) -> None:
        """Tell the judge that this process lives; at once what has changed for its ranks."""
        if flags != self._flags or now_s >= self._next_beat_s:
            self._flags, self._next_beat_s = flags, now_s + self._limits.host_beat_s
            self._judge.send(**flags)

    # What the judge says

    def _obey(self, message: dict[str, Any], number: int) -> None:
        if "verdict" in message:
            self._condemn(**message["verdict"])
        if number == DEPUTY:
            return
        self._heard_s = self._clock.now_s()
        if "judges" in message:
            self._judges = [RankView(**view) for view in message["judges"]]
            self._pulse()
            if message["deputy"] and not self._others:
                self._connect(*message["deputy"])
        if message.get("seen") and len(self._judges) > 1:
            for key, value in message["seen"].items():
                setattr(self._judges[1], key, value)
        if message.get("details") or "where" in message:
            self._judge.send(beats=[local.beat for local in self._ranks])
        if "where" in message:
            self._tell(self._running, where=True)
            for local in self._running:
                if self._heard_s - local.heard_s > 2 * BEAT_S and process_state(local.pid) == "stopped":
                    self._lose(local, "stopped")
        if "note" in message:
            self._tell(self._ranks[:1], note=message["note"])

    def _connect(self, host: str, port: int) -> None:
        """Come to the deputy; where that is not reached, this host speaks for itself when the judge is lost."""
        with suppress(OSError):
            self._circle.add(DEPUTY, wire := Wire(socket.create_connection((host, port), timeout=CONNECT_S)))
            wire.send(**self._hello)

    def _condemn(self, by: int | None, exit: int, delay_s: float) -> None:
        self._delay_s = delay_s
        self._tell(self._ranks, verdict={"by": by, "exit": exit, "delay_s": delay_s})

    # When the judge is lost

    def _judge_is_lost(self) -> None:
        """Say so, unless the deputy does."""
        state = "died" if self._judge.ended else "silent"
        if self._number == 0:
            if state == "silent" and process_state(self._judges[0].pid) == "stopped":
                state = "stopped"
            self._judge_state = state
        self._circle.tell([DEPUTY], judge=state)
        self._wait(SILENT_S, lambda: self._delay_s is not None or DEPUTY not in self._circle)
        if self._delay_s is not None:
            return
        if self._others:
            self._wait(WORD_S, lambda: bool(self._judge_state) or 0 not in (self._others or ()))
        else:
            self._wait(FIRST_SPEAKS_S * min(self._number, MAX_DELAYS), lambda: False)
        self._speak(state)
        verdict = {"by": None, "exit": EXIT_PEER_LOST, "delay_s": 0.0}
        if self._others:
            self._others.tell(range(self._n_hosts), verdict=verdict)
        self._condemn(**verdict)

    def _wait(self, patience_s: float, is_over: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + patience_s
        while not is_over() and time.monotonic() < deadline_s:
            self._turn()

    def _speak(self, state: str) -> None:
        """state: of the judge, as this host sees it."""
        judge, its_ranks = self._judges[0], self._judges[1:]
        # Where its own host has nothing to say of the judge, that is lost as a whole, for all that the deputy can know;
        # for the others, a connection that ends is one process's.
        whole = not self._judge_state and (state == "silent" or self._others is not None)
        lost = its_ranks if whole and its_ranks else [judge]
        for view in lost:
            view.state = self._judge_state or state
        self._tell(self._running, where=True)
        self._wait(ANSWER_S, lambda: all(local.answer is not None for local in self._running))
        mine = [RankView(local.rank, self._names[local.rank], socket.gethostname()) for local in self._running]
        for view, local in zip(mine, self._running, strict=True):
            update_view(view, local.beat, local.answer)
        message = describe([*lost, *mine], self._limits.heartbeat_timeout_s)
        say(message)
        records = {local.rank: local.answer.get("flight_recorder") for local in self._running if local.answer}
        write_down(self._folder, message, [*lost, *mine], records)


def update_view(view: RankView, beat: Mapping[str, Any], answer: Mapping[str, Any] | None) -> None:
    """Put what a rank has said of itself into what is known of it; answer: None where it was asked, and did not."""
    for key in ("pid", "step", "place", "collective", "still_s"):
        if key in beat:
            setattr(view, key, beat[key])
    if answer is None:
        view.waits_for = None
    elif answer:
        view.waits_for = tuple(range(*span) for span in answer["waits_for"])
        view.stack, view.collective = answer["stack"], answer["collective"]
