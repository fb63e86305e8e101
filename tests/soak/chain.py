"""A run that is killed again and again and started again each time, compared with one that nobody touched."""

from __future__ import annotations

import dataclasses
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from megagpt.checkpoint import folders
from tests.soak import trace
from tests.soak.case import BATCH, LAYOUTS, SAVE_INTERVAL, STEPS, Layout, command_line
from tests.soak.kill import Hit, Pace, draw_aim, measure_pace, strike
from tests.soak.moment import look
from tests.soak.ranks import Job, Way, start
from tests.soak.trace import Trace

KEPT = {folders.folder_of(Path(), step).name for step in (STEPS - SAVE_INTERVAL, STEPS)}
LAUNCH_S = 10.0  # from the command to the first step, about: each rank imports torch and DeepSpeed
MAX_RUNS = 5  # of a chain
DEADLINE_S = 120.0  # for what is left of a job to end by itself, or to start again
WHOLE_RUN_S = 500.0  # seconds on a machine with nothing else to do; the watch ends a run that hangs much sooner


@dataclass(frozen=True)
class Reference:
    """An uninterrupted run. Every checkpoint of it is kept."""

    trace: Trace
    reads: list[list[str]]
    pace: Pace

    @property
    def kept(self) -> Trace:
        """What is left of it where only two checkpoints are kept."""
        kept = {name: contents for name, contents in self.trace.checkpoints.items() if name in KEPT}
        return dataclasses.replace(self.trace, checkpoints=kept)


@dataclass(frozen=True)
class Chain:
    """A run that is to be killed n_kills times; number and seed decide all that is random in it."""

    number: int
    layout: Layout
    way: Way
    async_save: bool
    n_kills: int
    seed: int


@dataclass
class Cycle:
    """A kill and the restart after it. codes: exit codes of all ranks (-9: killed), or of their launcher; left: what
    lay on the disk ended_s later, when all had ended; problems: the last cycle has those of the finished run too.
    """

    chain: Chain
    hit: Hit
    codes: list[int] | None = None
    left: str = ""
    ended_s: float = 0.0
    resumed_from: int = 0
    wall_s: float = 0.0
    problems: list[str] = field(default_factory=list)


def make_chain(number: int, seed: int) -> Chain:
    """The number-th chain of a soak: layouts take turns, the rest is drawn."""
    random = Random(f"{seed} {number}")
    way: Way = random.choices(("fork", "program", "torchrun"), (0.9, 0.05, 0.05))[0]  # type: ignore[assignment]
    layout = LAYOUTS[number % len(LAYOUTS)]
    if layout.dp > 1 and way == "program":  # which starts no more ranks by itself than tp and pp need
        way = "torchrun"
    return Chain(number, layout, way, random.random() < 0.5, 3 if way == "fork" else 2, seed)


def make_reference(layout: Layout, dataset: str, folder: Path) -> Reference:
    """Train without interruption, on ranks from the fork server: how a run is started must not matter."""
    run, notes = folder / "run", folder / "attempt-0"
    folder.mkdir(parents=True)
    job = start("fork", layout.n_ranks, command_line(layout, dataset, run, keep_all=True), notes)
    pace = measure_pace(job, run)
    codes = job.codes()
    assert codes is not None and not any(codes), f"{folder}: the uninterrupted run ended with {codes}"
    found = trace.trace_of(run)
    assert len(found.checkpoints) == STEPS // SAVE_INTERVAL and not found.leftovers, found
    reads = trace.reads_of(notes, layout.n_ranks)
    assert [len(reads[rank]) for rank in (0, -1)] == [STEPS * BATCH // layout.dp] * 2, "not all samples were recorded"
    return Reference(found, reads, pace)


def run_chain(chain: Chain, reference: Reference, dataset: str, folder: Path) -> list[Cycle]:
    """Kill, restart, …, let it end, compare. The folder is deleted where nothing is wrong.

    A run that comes to its end before it was killed often enough is compared too, and another one is begun.
    """
    cycles: list[Cycle] = []
    random = Random(f"{chain.seed} {chain.number} kills")
    began = time.monotonic()
    for number in range(MAX_RUNS):
        life = _Life(chain, reference, dataset, folder / f"{number}")
        while len(cycles) < chain.n_kills:
            cycle = life.kill(random, saving=(chain.number + len(cycles)) % 2 == 0)
            if cycle is None:  # it has ended
                break
            cycles.append(cycle)
        problems = life.finish()
        if cycles:
            cycles[-1].problems += problems
        elif problems:
            raise AssertionError(f"{folder}, which nothing was done to: {problems}")
        if len(cycles) == chain.n_kills:
            break
    for cycle in cycles:
        cycle.wall_s = (time.monotonic() - began) / len(cycles)
    if not any(cycle.problems for cycle in cycles):
        shutil.rmtree(folder)
    return cycles


class _Life:
    """One run folder through its attempts."""

    def __init__(self, chain: Chain, reference: Reference, dataset: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._chain, self._reference, self._folder = chain, reference, folder
        self._run = folder / "run"
        self._argv = command_line(chain.layout, dataset, self._run, async_save=chain.async_save)
        self._attempts = 0
        self._done = 0  # steps, at the beginning of the attempt
        self._job = self._start()

    def kill(self, random: Random, *, saving: bool) -> Cycle | None:
        """Kill a rank at a random moment, wait for the others to end, and start the run again."""
        pace, n_ranks = self._reference.pace, self._chain.layout.n_ranks
        if self._chain.way != "fork":
            pace = dataclasses.replace(pace, start_s=LAUNCH_S)
        hit = strike(self._job, self._run, draw_aim(random, n_ranks, self._done, pace, saving=saving))
        if hit is None:
            return None
        cycle = Cycle(self._chain, hit)
        started = time.monotonic()
        if self._job.restarts_itself:
            cycle.problems += self._await_restart()
        else:
            cycle.codes = self._job.wait(DEADLINE_S)
            if cycle.codes is None:
                cycle.problems.append(f"not all had ended {DEADLINE_S:.0f} s after rank {hit.aim.rank} was killed")
                self._job.kill()
            cycle.problems += self._check_attempt(finished=False)
        cycle.ended_s = time.monotonic() - started
        rest = look(self._run)
        cycle.left, self._done = rest.window, rest.pointed or max(rest.complete, default=0)
        cycle.resumed_from = self._done
        if not self._job.restarts_itself:
            self._job = self._start()
        return cycle

    def _await_restart(self) -> list[str]:
        """Until all ranks are new ones, or the job ends; what is wrong where neither comes."""
        old, deadline = set(self._job.pids().values()), time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            new = set(self._job.pids().values())
            if (len(new) == self._chain.layout.n_ranks and not new & old) or self._job.codes() is not None:
                return []
            time.sleep(0.1)
        return [f"no new ranks {DEADLINE_S:.0f} s after one was killed"]

    def finish(self) -> list[str]:
        """Let the run come to its end; what is wrong with it."""
        codes = self._job.wait(WHOLE_RUN_S)
        if codes is None or any(codes):
            self._job.kill()
            return [f"the last attempt ended with {codes}"]
        return trace.differences(self._reference.kept, trace.trace_of(self._run)) + self._check_attempt(finished=True)

    def _start(self) -> Job:
        self._attempts += 1
        return start(self._chain.way, self._chain.layout.n_ranks, self._argv, self._notes)

    def _check_attempt(self, *, finished: bool) -> list[str]:
        """What an attempt leaves must be a part of what the uninterrupted run left: figures, checkpoints, samples."""
        expected, got = self._reference.trace, trace.losses_of(self._run)
        problems = trace.differing("rows so far", {k: expected.losses.get(k) for k in got}, got)
        for path in folders.checkpoints_of(self._run):
            problems += trace.differing(path.name, expected.checkpoints[path.name], trace.contents_of(path))
        if self._chain.way == "fork":
            reads = trace.reads_of(self._notes, self._chain.layout.n_ranks)
            share = self._done / STEPS
            problems += trace.read_differences(self._reference.reads, reads, skipped=share, all_of_it=finished)
        return problems

    @property
    def _notes(self) -> Path:
        return self._folder / f"attempt-{self._attempts}"
