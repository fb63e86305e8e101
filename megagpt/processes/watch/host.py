"""The host's part of the watch: a process that hears the ranks of one machine, and tells the judge of them all at once.

It finds who died, was stopped, is silent or stands still; what follows is the judge's to decide (judge.py). When the
judge itself is lost, the hosts say so, one after the other: the first launcher that ends all leaves the others no need.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megagpt.errors import EXIT_PEER_LOST
from megagpt.processes.watch.last_words import say, write_down
from megagpt.processes.watch.limits import BEAT_S, HANG_UP_S, START_S, TURN_S, Limits
from megagpt.processes.watch.machine import process_state
from megagpt.processes.watch.verdict import RankView, describe
from megagpt.processes.watch.wire import Circle, Wire

ANSWER_S = 0.5  # how long the ranks of a host may take to say where they are
FIRST_SPEAKS_S = 0.5  # between two hosts that say that the judge is lost
MAX_DELAYS = 6
JUDGE = -1  # its number among those that are heard


@dataclass
class Local:
    """A rank of this machine. state: as of `RankView`."""

    rank: int
    heard_s: float
    pid: int = 0
    beat: dict[str, Any] = field(default_factory=dict)
    state: str = "runs"


class HostWatch:
    """Owns a connection to each rank of its machine, and one to the judge."""

    def __init__(
        self, number: int, names: Mapping[int, str], listener: socket.socket, token: str, judge: Wire, limits: Limits
    ) -> None:
        """number: of the host in the run. names: of its ranks, for messages. token: of the run."""
        self._number, self._names, self._judge, self._limits = number, names, judge, limits
        self._circle = Circle(listener, token, len(names))
        self._circle.add(JUDGE, judge)
        self._clock = limits.clock()
        self._heard_s, self._next_beat_s = self._clock.now_s() + START_S, 0.0
        self._ranks = [Local(rank, self._clock.now_s()) for rank in names]
        self._judges = [
            RankView(-1, "the judge of the watch", step="")
        ]  # what is lost with it: it, and its host's ranks
        self._judge_is_here = number == 0
        self._folder: Path | None = None
        self._delay_s: float | None = None  # of the verdict, once there is one
        judge.send(token=token, number=number, host=socket.gethostname(), pid=os.getpid())

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

    def _turn(self) -> None:
        for number, message in self._circle.hear(TURN_S, self._clock.now_s()):
            if number == JUDGE:
                self._obey(message)
            else:
                self._take(self._ranks[number], message)
        now_s = self._clock.now_s()
        if now_s >= self._next_beat_s and self._delay_s is None:
            self._next_beat_s = now_s + BEAT_S
            self._beat(now_s)

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

    def _beat(self, now_s: float) -> None:
        """Look for the silent, tell the judge of all, and the ranks that this process lives.

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
        beats = [local.beat for local in self._ranks]
        self._judge.send(beats=beats, silent=bool(silent), paused=paused, hangs=hangs)
        self._tell([local for local in self._running if local not in stopped], pulse=True)

    # What the judge says

    def _obey(self, message: dict[str, Any]) -> None:
        self._heard_s = self._clock.now_s()
        if "judges" in message:
            self._judges = [RankView(**view) for view in message["judges"]]
        if "seen" in message and len(self._judges) > 1:
            for key, value in message["seen"].items():
                setattr(self._judges[1], key, value)
        if "where" in message:
            self._tell(self._running, where=True)
            for local in self._running:
                if self._heard_s - local.heard_s > 2 * BEAT_S and process_state(local.pid) == "stopped":
                    self._lose(local, "stopped")
        if "note" in message:
            self._tell(self._ranks[:1], note=message["note"])
        if "verdict" in message:
            self._condemn(**message["verdict"])

    def _condemn(self, by: int | None, exit: int, delay_s: float) -> None:
        self._delay_s = delay_s
        self._tell(self._ranks, verdict={"by": by, "exit": exit, "delay_s": delay_s})

    def _judge_is_lost(self) -> None:
        """Say so, after the hosts before this one have had the time to."""
        state = "died" if self._judge.ended else "silent"
        judge, its_ranks = self._judges[0], self._judges[1:]
        if state == "silent" and self._judge_is_here and process_state(judge.pid) == "stopped":
            state = "stopped"
        answers: dict[int, dict[str, Any]] = {}
        self._tell(self._running, where=True)
        turn_s = time.monotonic() + FIRST_SPEAKS_S * min(self._number, MAX_DELAYS)  # until it is this host's
        while (now_s := time.monotonic()) < turn_s + ANSWER_S and (now_s < turn_s or len(answers) < len(self._running)):
            for number, message in self._circle.hear(TURN_S, self._clock.now_s()):
                if number != JUDGE:
                    self._take(self._ranks[number], message)
                if "answer" in message:
                    answers[self._ranks[number].rank] = message["answer"]
        # A host that is silent is lost as a whole; a connection that ends is one process's.
        lost = its_ranks if state == "silent" and its_ranks and not self._judge_is_here else [judge]
        for view in lost:
            view.state = state
        mine = [RankView(local.rank, self._names[local.rank], socket.gethostname()) for local in self._running]
        for view, local in zip(mine, self._running, strict=True):
            update_view(view, local.beat, answers.get(local.rank))
        message = describe([*lost, *mine], self._limits.heartbeat_timeout_s)
        say(message)
        write_down(self._folder, message, [*lost, *mine], {r: a.get("flight_recorder") for r, a in answers.items()})
        self._condemn(None, EXIT_PEER_LOST, 0.0)


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
