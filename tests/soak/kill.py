"""kill -9 of a rank at a moment, as exactly as the disk and the clock allow, and a note of where it hit."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

from megagpt import metrics_file
from tests.soak.case import SAVE_INTERVAL, STEPS
from tests.soak.moment import QUIET, WINDOWS, Look, look
from tests.soak.ranks import Job

LOOK_S = 0.0003  # between two looks at the disk
SLOW_S = 0.3  # between two looks at the processes


@dataclass(frozen=True)
class Pace:
    """How long the parts of an uninterrupted run take. start_s: until the first step is done; save_s: of one save."""

    start_s: float
    step_s: float
    save_s: float


@dataclass(frozen=True)
class Aim:
    """A moment. After `after_s` seconds (saves is 0); or, from the saves-th save of the attempt on, when the disk looks
    like `window` (None: when the temporary folder appears), and then after `after_s`.
    """

    rank: int
    after_s: float
    saves: int = 0
    window: str | None = None


@dataclass(frozen=True)
class Hit:
    """A kill. phase: starting | training | saving | ending. window: what lay on the disk. step: the last one reported."""

    aim: Aim
    phase: str
    window: str
    step: int


def draw_aim(random: Random, n_ranks: int, done: int, pace: Pace, *, saving: bool) -> Aim:
    """A random moment of an attempt that begins after `done` steps.

    saving: at a moment of one of its saves, of which one in two is aimed at a window of its own, since some last no
    longer than a system call; else uniformly over the time that the attempt will take.
    """
    rank = random.randrange(n_ranks)
    if not saving:
        return Aim(rank, random.uniform(0, pace.start_s + pace.step_s * (STEPS - done)))
    saves = random.randint(1, max(1, (STEPS - done) // SAVE_INTERVAL))
    if random.random() < 0.5:
        return Aim(rank, random.uniform(0, 1.2 * pace.save_s), saves)
    return Aim(rank, random.uniform(0, 0.001), saves, random.choice(WINDOWS[1:]))


def strike(job: Job, run: Path, aim: Aim) -> Hit | None:
    """Wait for the moment and kill the rank; None where the job has ended before."""
    watch = Watch(run)
    start, looked, pid = time.monotonic(), 0.0, None
    due = start + aim.after_s if aim.saves == 0 else None
    while True:
        now = time.monotonic()
        if now - looked > SLOW_S or (due is not None and now >= due and pid is None):
            looked, pid = now, job.pids().get(aim.rank)
            if pid is None and job.codes() is not None:
                return None
        watch.look()
        if due is None and watch.saves >= aim.saves and aim.window in (None, watch.seen.window):
            due = now + aim.after_s
        if due is not None and now >= due and pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return watch.hit(aim)
            pid = None
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
        if first is None and watch.last_step() > 0:
            first = now - start
        time.sleep(LOOK_S)
    total = time.monotonic() - start
    whole = sorted(s for s in save_s if s > 0)
    assert first and whole, f"{run} ended without a step or a save: see what it printed"
    return Pace(first, (total - first) / STEPS, whole[len(whole) // 2])


class Watch:
    """What an attempt does to the folder of its run. What lay there before its start does not count."""

    def __init__(self, run: Path) -> None:
        self._run, self._metrics = run, run / metrics_file.NAME
        self.seen: Look = look(run)
        self._stale = self.seen.saving
        self._metrics_before = self._inode()
        self._done = self.seen.pointed
        self.saves = 0

    def look(self) -> None:
        """Look again."""
        before, now = self.seen.saving, look(self._run)
        if now.saving != self._stale:
            self._stale = None
            self.saves += now.saving is not None and now.saving != before
        self.seen = now

    def last_step(self) -> int:
        """The last step that this attempt reported; 0 before it has reported any."""
        if self._inode() == self._metrics_before:
            return 0
        steps = [row["step"] for row in metrics_file.read_rows(self._metrics) if "loss" in row]
        return steps[-1] if steps and steps[-1] > self._done else 0

    def hit(self, aim: Aim) -> Hit:
        """What a kill at this moment has hit."""
        now, step = look(self._run), self.last_step()
        phase = "training"
        if self.saves and now.window != QUIET:
            phase = "saving"
        elif step == 0:
            phase = "starting"
        elif now.pointed == STEPS:
            phase = "ending"
        return Hit(aim, phase, now.window if phase == "saving" else QUIET, step)

    def _inode(self) -> int:
        try:
            return self._metrics.stat().st_ino
        except FileNotFoundError:
            return 0
