"""kill -9 of a rank at a moment, as exactly as the disk and the clock allow, and a note of where it hit."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megagpt.train import metrics_file
from tests.soak.case import SAVE_INTERVAL, STEPS
from tests.soak.moment import DELETING, EMPTY, INDEX, POINTER, QUIET, RENAMED, SUMS, TENSORS, Look, look
from tests.soak.ranks import Job

LOOK_S = 0.0003  # between two looks at the disk
SLOW_S = 0.3  # between two looks at the processes
WEIGHTS = {EMPTY: 1, TENSORS: 0, INDEX: 2, SUMS: 2, RENAMED: 6, POINTER: 2, DELETING: 6}  # the shorter, the more often


@dataclass(frozen=True)
class Pace:
    """How long the parts of an uninterrupted run take. start_s: until the first step is done; save_s: of one save."""

    start_s: float
    step_s: float
    save_s: float


@dataclass(frozen=True)
class Aim:
    """A moment: `after_s` seconds after what is waited for. That is the start (steps and saves are 0), the report of a
    step, or, from the saves-th save of the attempt on, that the disk looks like `window` (None: the temporary folder).
    """

    rank: int
    after_s: float
    step: int = 0
    saves: int = 0
    window: str | None = None


@dataclass(frozen=True)
class Hit:
    """A kill. phase: starting | training | saving | ending. window: what lay on the disk. step: the last reported."""

    aim: Aim
    phase: str
    window: str
    step: int


def draw_aim(random: Random, n_ranks: int, done: int, pace: Pace, *, saving: bool) -> Aim:
    """A random moment of an attempt that begins after `done` steps.

    saving: in one of its saves; every second of these is aimed at a window, some of which last no longer than a system
    call. Else uniformly over the time that the attempt takes, told by its steps, since a busy machine changes its pace.
    """
    rank = random.randrange(n_ranks)
    if saving:
        saves = random.randint(1, max(1, (STEPS - done) // SAVE_INTERVAL))
        if random.random() < 0.5:
            return Aim(rank, random.uniform(0, pace.save_s), saves=saves)
        rank = random.choice((0, rank))  # rank 0 does most of it alone
        return Aim(rank, 0.0, saves=saves, window=random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0])
    moment = random.uniform(0, pace.start_s + pace.step_s * (STEPS - done))
    if moment < pace.start_s:
        return Aim(rank, moment)
    steps, rest = divmod(moment - pace.start_s, pace.step_s)
    return Aim(rank, rest, step=done + 1 + int(steps))


def strike(job: Job, run: Path, aim: Aim) -> Hit | None:
    """Wait for the moment and kill the rank; None where the job ends before.

    A moment that has passed unseen (a window shorter than a look, a start faster than the reference's) is taken at the
    next occasion: the first step, or the end of the last save.
    """
    watch = Watch(run)
    due: float | None = None
    looked, pid = 0.0, None
    while True:
        now = time.monotonic()
        watch.look()
        due = watch.due(aim, now) if due is None else due
        too_late = watch.reported > 0 if aim.step == aim.saves == 0 else watch.seen.pointed == STEPS
        if now - looked > SLOW_S or (pid is None and due is not None and now >= due):
            looked, pid = now, job.pids().get(aim.rank)
            if pid is None and job.codes() is not None:
                return None
        if pid is not None and due is not None and (now >= due or too_late):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return watch.hit(aim)
            pid = None
        if due is not None or not aim.window or watch.seen.window == QUIET:  # else it comes at any moment
            time.sleep(LOOK_S)


def measure_pace(job: Job, run: Path) -> Pace:
    """Watch a run from its start to its end."""
    watch = Watch(run)
    start, first, looked, save_s = time.monotonic(), None, 0.0, []
    while (now := time.monotonic()) - looked < SLOW_S or job.codes() is None:
        looked = now if now - looked >= SLOW_S else looked
        before = watch.seen
        watch.look()
        if before.window == QUIET != watch.seen.window:
            save_s.append(-now)
        elif save_s and save_s[-1] < 0 and watch.seen.window == QUIET:
            save_s[-1] += now
        if first is None and watch.reported > 0:
            first = now - start
        time.sleep(LOOK_S)
    total = time.monotonic() - start
    whole = sorted(s for s in save_s if s > 0)
    assert first and whole, f"{run} ended without a step or a save: see what it printed"
    return Pace(first, (total - first) / STEPS, whole[len(whole) // 2])


class Watch:
    """What an attempt does to the folder of its run. What lay there before its start does not count.

    seen: the last look. saves: how many have begun. reported: the last step that this attempt has reported.
    """

    def __init__(self, run: Path) -> None:
        self._run, self._metrics = run, run / metrics_file.NAME
        self._start = time.monotonic()
        self.seen: Look = look(run)
        self.saves, self.reported = 0, 0
        self._stale, self._done = self.seen.saving, self.seen.pointed
        self._before = self._written = self._stat()

    def look(self) -> None:
        """Look again."""
        before, now = self.seen.saving, look(self._run)
        if now.saving != self._stale:
            self._stale = None
            self.saves += now.saving is not None and now.saving != before
        self.seen = now
        written = self._stat()
        if written != self._written and written[0] != self._before[0]:
            self._written = written
            rows = [row["step"] for row in metrics_file.read_rows(self._metrics) if "loss" in row]
            self.reported = rows[-1] if rows and rows[-1] > self._done else 0

    def due(self, aim: Aim, now: float) -> float | None:
        """When to kill, once what the aim waits for has come."""
        if aim.saves:
            came = self.saves >= aim.saves and aim.window in (None, self.seen.window)
            came |= self.seen.pointed == STEPS and self.saves > 0
        elif aim.step:
            came = self.reported >= aim.step
        else:
            return self._start + aim.after_s
        return now + aim.after_s if came else None

    def hit(self, aim: Aim) -> Hit:
        """What a kill at this moment has hit."""
        self.look()
        window = self.seen.window if self.saves else QUIET
        if window != QUIET:
            phase = "saving"
        elif self.reported == 0:
            phase = "starting"
        else:
            phase = "ending" if self.seen.pointed == STEPS else "training"
        return Hit(aim, phase, window, self.reported)

    def _stat(self) -> tuple[int, int]:
        """Which file metrics.jsonl is, and how long; it is replaced when an attempt opens it."""
        try:
            stat = self._metrics.stat()
        except FileNotFoundError:
            return 0, 0
        return stat.st_ino, stat.st_size
