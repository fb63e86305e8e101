"""The judge of the watch: a process of its own that hears every host, and ends all when one rank is lost.

It asks all for their places first, says one line that names the cause, writes down what it knows, and sends the
verdict. What hosts tell it: host.py. What the ranks do with a verdict: watch.py.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megagpt.errors import EXIT_PEER_LOST, SILENT_S
from megagpt.processes.watch.host import update_view
from megagpt.processes.watch.last_words import say, write_down
from megagpt.processes.watch.limits import BEAT_S, HANG_UP_S, START_S, TURN_S, Limits
from megagpt.processes.watch.machine import process_state
from megagpt.processes.watch.slow import SlowRanks, Work
from megagpt.processes.watch.verdict import RankView, describe, needs
from megagpt.processes.watch.wire import Circle

REST_S = 0.2  # between two turns, so that one takes many messages: waking up costs more than they do
QUESTION_REST_S = 0.02  # likewise, while all answer at once
ANSWER_S = 3.0  # how long the answers to "where are you" may take on a busy machine,
ANSWER_PER_RANK_S = 0.0005  # and more, the more there are


@dataclass
class HostView:
    """What is known of one host. heard_s: when last. awake_s: when last not all of its ranks were stopped.

    beats: of its ranks, in their order, as they were when it was last asked for details. silent, hangs: whether some
    miss beats, or stand still for too long.
    """

    ranks: Sequence[int]
    heard_s: float
    awake_s: float
    name: str = "an unknown host"
    pid: int = 0
    beats: list[dict[str, Any]] = field(default_factory=list)
    silent: bool = False
    paused: bool = False
    hangs: bool = False
    gone: bool = False


class Judge:
    """Owns a connection to every host, its own included."""

    def __init__(
        self,
        listener: socket.socket,
        token: str,
        hosts: Sequence[Sequence[int]],
        names: Sequence[str],
        stages: Sequence[Sequence[int]],
        limits: Limits,
    ) -> None:
        """hosts: the ranks of each. names: of the ranks, for messages. stages: the ranks of each pipeline stage."""
        self._limits, self._clock = limits, limits.clock()
        self._circle = Circle(listener, token, range(len(hosts)))
        now_s = self._clock.now_s()
        first_s = now_s + START_S  # a host that does not reach this one says so before
        self._hosts = [HostView(ranks, first_s, first_s) for ranks in hosts]
        self._host_of = {rank: host for host in self._hosts for rank in host.ranks}
        self._views = [RankView(rank, name) for rank, name in enumerate(names)]
        self._n_left, self._first_left_s = 0, 0.0  # how many have left; when rank 0 did
        self._lost: list[RankView] = []  # ranks, and processes of the watch
        self._hangs = False
        self._failed: tuple[int, int] | None = None  # rank, exit code for the others
        self._over = False  # a host has ended all
        self._answers: dict[int, dict[str, Any]] = {}
        self._slow = SlowRanks(stages, limits.slow_rank_factor, limits.window_s)
        self._folder: Path | None = None  # where faults are written down, once it is known
        self._deputy: tuple[str, int] | None = None  # where the hosts reach it
        self._opened = False
        self._next_look_s = self._next_pulse_s = self._next_details_s = 0.0

    def run(self) -> int:
        """Until all ranks have left, or were ended; returns the exit code for who waits for that."""
        while self._n_left < len(self._views):
            time.sleep(REST_S)
            self._turn()
            if self._over:
                return EXIT_PEER_LOST
            if self._failed:
                return self._end_silently(*self._failed)
            if self._lost or self._hangs:
                return self._end()
        self._circle.close()
        return 0

    def _turn(self) -> None:
        """Take in what has come, or comes soon; judge and give signs of life, each at its pace."""
        for number, message in self._circle.hear(TURN_S, self._clock.now_s()):
            self._take(self._hosts[number], message)
        now_s = self._clock.now_s()
        if now_s >= self._next_look_s:
            self._next_look_s = now_s + BEAT_S
            self._judge(now_s)
            self._find_slow(now_s)
        if not self._opened and self._circle.complete and (self._deputy or len(self._hosts) == 1):
            self._open()
        if now_s >= self._next_pulse_s:
            self._next_pulse_s = now_s + self._limits.host_beat_s
            self._pulse(now_s)

    def _open(self) -> None:
        """Tell all hosts what they have to know when this process is lost."""
        self._opened = True
        first = self._hosts[0]
        judge = RankView(-1, "the judge of the watch", first.name, os.getpid(), step="")
        views = [asdict(view) for view in (judge, *(self._views[rank] for rank in first.ranks))]
        self._tell(judges=views, deputy=self._deputy)

    def _pulse(self, now_s: float) -> None:
        """Tell the hosts that this process lives; ask where all ranks are, once in a while."""
        if details := now_s >= self._next_details_s:
            all_known = all(host.beats and all(host.beats) for host in self._hosts)
            self._next_details_s = now_s + (self._limits.window_s if all_known else 0.0)
        self._tell(seen=_seen(self._hosts[0]), details=details)

    def _tell(self, **message: Any) -> None:
        self._circle.tell(range(len(self._hosts)), **message)

    # Hearing

    def _take(self, host: HostView, message: dict[str, Any]) -> None:
        """A message of a host: of all its ranks, or what happened to one of them."""
        host.heard_s = self._clock.now_s()
        if "hello" in message:
            host.name, host.pid = message["hello"].host, message["hello"].pid
            for rank in host.ranks:
                self._views[rank].host = host.name
        if "silent" in message:
            host.silent, host.paused, host.hangs = message["silent"], message["paused"], message["hangs"]
        host.beats = message.get("beats", host.beats)
        self._deputy = message.get("deputy", self._deputy)
        if "rank" in message:
            self._take_of(self._views[message["rank"]], message)
        if "over" in message:
            self._over = self._over or any(self._views[rank].state == "runs" for rank in host.ranks)
        if "gone" in message:
            host.gone = True
            if any(self._views[rank].state == "runs" for rank in host.ranks):
                self._lose_watch(host, "died")

    def _take_of(self, view: RankView, message: dict[str, Any]) -> None:
        """What happened to one rank. beat: as it was by then."""
        update_view(view, message["beat"], {})
        if "lost" in message and view.state == "runs":
            self._lose(view, message["lost"])
        if "failed" in message:
            self._failed = self._failed or (view.rank, message["failed"])
        if "folder" in message:
            self._folder = Path(message["folder"])
        if "answer" in message:
            self._answers[view.rank] = message["answer"]
        if "bye" in message and view.state == "runs":
            view.state = "left"
            self._n_left += 1
            self._slow.stop()  # nothing to compare any more
            if view.rank == 0:
                self._first_left_s = self._clock.now_s()

    def _lose(self, view: RankView, state: str) -> None:
        view.state = state
        self._lost.append(view)

    def _lose_ranks(self, host: HostView, views: Sequence[RankView], state: str) -> None:
        """All ranks of a host that run are lost; what is known of them is what they said last."""
        for rank, beat in zip(host.ranks, host.beats, strict=False):
            update_view(self._views[rank], beat, {})
        for view in views:
            view.watch = host.pid if state == "silent" else 0
            self._lose(view, state)

    def _lose_watch(self, host: HostView, state: str) -> None:
        """The process that watches over a host is lost; nothing is known of its ranks."""
        for rank in host.ranks:
            if self._views[rank].state == "runs":
                self._views[rank].state = "unwatched"
        self._lost.append(RankView(-1, "the watch", host.name, host.pid, step="", state=state))

    # Judging

    def _judge(self, now_s: float) -> None:
        """Find hosts that are silent, whole hosts that were stopped, and what stands still."""
        hosts = [host for host in self._hosts if not host.gone]
        paused = all(host.paused for host in hosts)  # the whole job is; that ends nobody
        for host in hosts:
            if host.pid and (paused or not host.paused):
                host.awake_s = now_s
            silent = now_s - host.heard_s > self._limits.heartbeat_timeout_s
            if not silent and now_s - host.awake_s <= self._limits.heartbeat_timeout_s:
                continue
            running = [self._views[rank] for rank in host.ranks if self._views[rank].state == "runs"]
            if running and silent and host is self._hosts[0] and process_state(host.pid) == "stopped":
                self._lose_watch(host, "stopped")
            else:
                self._lose_ranks(host, running, "silent" if silent else "stopped")
        waits = self._views[0].state == "left" and now_s - self._first_left_s > self._limits.progress_timeout_s
        # Where one is silent the others may well stand still: it will be named.
        self._hangs = waits or (any(host.hangs for host in hosts) and not any(host.silent for host in hosts))

    def _find_slow(self, now_s: float) -> None:
        if not self._slow.is_due(now_s):
            return
        beats = {rank: beat for host in self._hosts for rank, beat in zip(host.ranks, host.beats, strict=False) if beat}
        work = {r: Work(b["steps_done"], b["busy_s"], b["waiting_s"]) for r, b in beats.items()}
        for slow in self._slow.update(now_s, work):
            view = self._views[slow.rank]
            self._circle.tell([0], note=f"{view.name} on {view.host} is slow: {slow}")

    # Ending

    def _end_silently(self, rank: int, code: int) -> int:
        """A rank has failed and speaks for itself: the others end without a word, after it."""
        self._tell(verdict={"by": rank, "exit": code, "delay_s": SILENT_S})
        self._see_off(SILENT_S + HANG_UP_S)
        return code

    def _end(self) -> int:
        self._question()
        limits = self._limits
        timeout_s = limits.heartbeat_timeout_s if self._lost else limits.progress_timeout_s
        views = [*self._views, *(view for view in self._lost if view.rank < 0)]
        message = describe(views, timeout_s)
        say(message)
        records = {rank: answer["flight_recorder"] for rank, answer in sorted(self._answers.items())}
        write_down(self._folder, message, views, records)
        self._tell(verdict={"by": None, "exit": EXIT_PEER_LOST, "delay_s": 0.0})
        self._see_off(HANG_UP_S)
        return EXIT_PEER_LOST

    def _question(self) -> None:
        """Ask all for their places."""
        self._tell(where=True)
        deadline_s = time.monotonic() + ANSWER_S + ANSWER_PER_RANK_S * len(self._views)
        while time.monotonic() < deadline_s and any(
            view.state == "runs" and view.rank not in self._answers for view in self._views
        ):
            time.sleep(QUESTION_REST_S)
            self._turn()
        for host in self._hosts:
            for rank, beat in zip(host.ranks, host.beats, strict=False):
                if self._views[rank].state == "runs":
                    answer = self._answers.get(rank)
                    update_view(self._views[rank], {} if answer else beat, answer)
        first = self._views[0]
        if first.state == "left" and not any(0 in span for view in self._views for span in view.waits_for or ()):
            first.waits_for = needs(-1, "recv", [view.rank for view in self._views if view.state != "left"])

    def _see_off(self, patience_s: float) -> None:
        """Until all hosts have gone, which read what they were told first."""
        deadline_s = time.monotonic() + patience_s
        while not self._circle.empty and time.monotonic() < deadline_s:
            for _ in self._circle.hear(TURN_S, self._clock.now_s()):
                pass
        self._circle.close()


def _seen(host: HostView) -> dict[str, Any]:
    """Where the first rank of a host is."""
    first = host.beats[0] if host.beats else {}
    return {key: first[key] for key in ("step", "place", "collective", "pid") if key in first}
