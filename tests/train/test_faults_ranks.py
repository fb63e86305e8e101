"""A rank that dies, stops, hangs, fails or is slow: the others end in time, with the right code, and one message.

All cases are started together, since most of their time is waiting for a timeout.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagpt.errors import EXIT_PEER_LOST, EXIT_USER, SILENT_S, UserError
from megagpt.parallel.collectives import all_reduce
from megagpt.parallel.mesh import Mesh
from megagpt.processes.local import run_ranks  # noqa: F401  # its presence starts the fork server early: conftest.py
from megagpt.processes.watch.limits import Limits
from megagpt.processes.watch.machine import process_state
from megagpt.processes.watch.watch import Watch
from tests.processes.watch.watched import Ranks, start

HOST = re.escape(socket.gethostname())
TIMEOUT_S = 10.0  # a starved rank may give no sign of life for some seconds
QUICK = Limits(heartbeat_timeout_s=TIMEOUT_S, progress_timeout_s=TIMEOUT_S)
NAMES = [re.escape(f"rank {r} (pipe {r // 2}, data 0, model {r % 2})") for r in range(4)]
pytestmark = pytest.mark.timeout(600)  # the first test starts all


def work(mesh: Mesh, watch: Watch, step: int) -> None:
    """A step with the communication of a real one: over the model axis, from stage to stage, over the data axis."""
    with watch.step(step):
        x = torch.ones(4)
        x = all_reduce(x, mesh.model)
        stage_size = mesh.data.size * mesh.model.size
        if mesh.pipe.rank > 0:
            dist.recv(x, mesh.rank - stage_size)
        if mesh.pipe.rank < mesh.pipe.size - 1:
            dist.send(x, mesh.rank + stage_size)
        all_reduce(x, mesh.data)
        time.sleep(0.2)  # steps of all these ranks at once must leave the machine idle


def steps(mesh: Mesh, watch: Watch, folder: Path, bad_rank: int = -1, kind: str = "") -> None:
    """Steps without end; in step 3 one rank does something else."""
    watch.write_to(folder / "faults")
    for step in range(1, 1_000_000):
        if step == 3 and mesh.rank == bad_rank:
            with watch.step(step):
                FAULTS[kind](mesh)
        work(mesh, watch, step)
        if step == 3:
            print("working", flush=True)


def loop(mesh: Mesh) -> None:
    while True:
        math.sqrt(2.0)


def hold_the_lock(mesh: Mesh) -> None:
    ctypes.PyDLL(None).sleep(120)  # C code that does not let go of Python's lock


def join_what_nobody_joins(mesh: Mesh) -> None:
    all_reduce(torch.ones(4), mesh.pipe)


def return_early(mesh: Mesh) -> None:
    sys.exit(0)


def raise_value_error(mesh: Mesh) -> None:
    raise ValueError("a bug")


def raise_runtime_error(mesh: Mesh) -> None:
    raise RuntimeError("a bug")


def raise_user_error(mesh: Mesh) -> None:
    raise UserError("the disk is full; make room")


def exit_unseen(mesh: Mesh) -> None:
    time.sleep(1.5)  # long enough to be seen here
    os._exit(7)


FAULTS = {
    f.__name__: f
    for f in (
        loop, hold_the_lock, join_what_nobody_joins, return_early, raise_value_error, raise_runtime_error,
        raise_user_error, exit_unseen,
    )
}  # fmt: skip


def end_apart(mesh: Mesh, watch: Watch, folder: Path, last: int) -> None:
    work(mesh, watch, 1)
    if mesh.rank == last:
        time.sleep(TIMEOUT_S + 1.0)


def uneven(mesh: Mesh, watch: Watch, folder: Path, slow_rank: int) -> None:
    """Steps of 20 ms, on one rank of 200, until somebody is named; for 6 s where nobody should be."""
    end = time.monotonic() + (6.0 if slow_rank == -1 else 60.0)
    done = torch.zeros(1)
    step = 0
    while not done:
        step += 1
        with watch.step(step):
            time.sleep(0.20 if mesh.rank == slow_rank else 0.02)
            all_reduce(torch.ones(4), mesh.data)
        notes = watch.notes()
        for note in notes:
            print(f"note: {note}", flush=True)
        done = all_reduce(torch.tensor([float(mesh.rank == 0 and (time.monotonic() > end or len(notes)))]), mesh.data)


@dataclass(frozen=True)
class Case:
    """What runs, on which mesh (pp, dp, tp), and which rank gets which signal, or never comes."""

    function: object
    shape: tuple[int, int, int]
    args: tuple = ()
    limits: Limits = QUICK
    signal: tuple[int, int] | None = None
    absent: int = -1


PATIENT = Limits()
EACH, JUDGE, HOST_WATCH = -1, -2, -3  # in place of a rank: all of them; the processes of the watch
CASES = {
    "killed": Case(steps, (2, 2, 2), (), PATIENT, (5, signal.SIGKILL)),
    "rank 0 killed": Case(steps, (1, 1, 3), (), PATIENT, (0, signal.SIGKILL)),
    "exit_unseen": Case(steps, (2, 1, 2), (3, "exit_unseen"), PATIENT),
    "raise_runtime_error": Case(steps, (1, 1, 3), (1, "raise_runtime_error"), PATIENT),
    "rank 0 fails": Case(steps, (1, 1, 3), (0, "raise_value_error"), PATIENT),
    "raise_user_error": Case(steps, (1, 1, 3), (1, "raise_user_error"), PATIENT),
    "stopped": Case(steps, (2, 1, 2), (), QUICK, (3, signal.SIGSTOP)),
    "rank 0 stopped": Case(steps, (1, 1, 3), (), QUICK, (0, signal.SIGSTOP)),
    "judge killed": Case(steps, (1, 1, 3), (), PATIENT, (JUDGE, signal.SIGKILL)),
    "judge stopped": Case(steps, (1, 1, 3), (), QUICK, (JUDGE, signal.SIGSTOP)),
    "host's watch stopped": Case(steps, (1, 1, 3), (), QUICK, (HOST_WATCH, signal.SIGSTOP)),
    "host's watch killed": Case(steps, (1, 1, 3), (), PATIENT, (HOST_WATCH, signal.SIGKILL)),
    "paused": Case(steps, (1, 1, 3), (), QUICK, (EACH, signal.SIGSTOP)),
    "loop": Case(steps, (2, 1, 2), (3, "loop")),
    "hold_the_lock": Case(steps, (2, 1, 2), (3, "hold_the_lock")),
    "different": Case(steps, (2, 1, 2), (3, "join_what_nobody_joins")),
    "return_early": Case(steps, (2, 1, 2), (0, "return_early")),
    "rank 0 last": Case(end_apart, (1, 1, 3), (0,), Limits(heartbeat_timeout_s=TIMEOUT_S)),
    "rank 2 last": Case(end_apart, (1, 1, 3), (2,), Limits(heartbeat_timeout_s=TIMEOUT_S)),
    "rank 1 missing": Case(steps, (1, 1, 3), absent=1),
    "rank 0 missing": Case(steps, (1, 1, 3), absent=0),
}


@dataclass(frozen=True)
class Running:
    """A case that was started; began_s: when, or when its signal was sent."""

    ranks: Ranks
    began_s: float

    def end(self, within_s: float, *leave_out: int) -> list[int | None]:
        """Exit codes; all end within that time of the beginning."""
        return self.ranks.end(max(1.0, self.began_s + within_s - time.monotonic()), *leave_out)


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[dict[str, Running]]:
    """All cases, started, and those with a signal at work when they got it."""
    with ExitStack() as stack:
        found = {}
        for name, case in CASES.items():
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            ranks = start(folder, case.function, case.shape, case.limits, folder, *case.args, absent=case.absent)
            found[name] = Running(stack.enter_context(ranks), time.monotonic())
        for name, case in CASES.items():
            if case.signal:
                found[name].ranks.wait_for("working")
                rank, number = case.signal
                if rank in (JUDGE, HOST_WATCH):
                    os.kill(pid := watch_of(found[name].ranks)[rank], number)
                    stack.callback(end_stopped, pid)
                for each in range(math.prod(case.shape)) if rank == EACH else [rank] * (rank >= 0):
                    found[name].ranks.signal(each, number)
                found[name] = Running(found[name].ranks, time.monotonic())
        yield found


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def watch_of(ranks: Ranks) -> dict[int, int]:
    """The processes of the watch: rank 0's child is the judge, and its child the watch on the host.

    Ranks need not wait for these: they come to a port that is open before them.
    """
    (judge,) = children(ranks.processes[0].pid)
    end = time.monotonic() + START_S
    while not (found := children(judge)) and time.monotonic() < end:
        time.sleep(0.05)
    assert len(found) == 1, ranks.all_output
    (host,) = found
    return {JUDGE: judge, HOST_WATCH: host}


def end_stopped(pid: int) -> None:
    if process_state(pid) == "stopped":
        os.kill(pid, signal.SIGKILL)


START_S = 30.0  # of three or four ranks, beside all the others


def test_a_killed_rank_is_named_at_once(running):
    """Its neighbours on all three axes end, and those that share none with it."""
    case = running["killed"]
    assert case.end(20.0) == [-signal.SIGKILL if r == 5 else EXIT_PEER_LOST for r in range(8)]  # not a timeout's 60 s
    (error,) = case.ranks.errors
    assert re.match(rf"error: rank 5 \(pipe 1, data 0, model 1\) on {HOST} died \(process \d+, last seen ", error)
    assert re.search(r"ranks? [\d, and]+ (more )?(waits? in \w+|is|are) at \S+\.py:\d+ \w+", error), error
    assert "--auto-resume" in error and "Traceback" not in case.ranks.all_output


def test_rank_0_may_be_the_killed_one(running):
    case = running["rank 0 killed"]
    assert case.end(SILENT_S + 20.0) == [-signal.SIGKILL, *[EXIT_PEER_LOST] * 2]
    (error,) = case.ranks.errors
    assert re.match(rf"error: {NAMES[0]} on {HOST} died", error), error
    assert re.search(r"ranks? 1 (and 2 )?(waits? in|is at|are at) ", error), error


OTHER_PLACES = {
    "exit_unseen": r"died \(process \d+, last seen in step 3 at \S*test_faults_ranks.py:\d+ exit_unseen",
    "stopped": r"was stopped by a signal \(process \d+, last seen .*kill -9 \d+",
    "loop": r"hangs in step 3 at \S*test_faults_ranks.py:\d+ loop, in no collective; others wait since 10 s",
    "hold_the_lock": r"gave no sign of life for 10 s \(process \d+, last seen ",
}


@pytest.mark.parametrize("name", OTHER_PLACES)
def test_a_rank_that_does_not_come_is_named_with_its_place(running, name):
    case = running[name]
    stays = [3] if name in ("stopped", "hold_the_lock") else []
    assert case.end(START_S + 2 * TIMEOUT_S, *stays)[:3] == [EXIT_PEER_LOST] * 3
    (error,) = case.ranks.errors
    assert re.match(rf"error: {NAMES[3]} on {HOST} {OTHER_PLACES[name]}", error), error
    assert re.search(r"rank(s [01, and]+)? 2 waits? in (all_reduce|recv) at \S+\.py:\d+ \w+;", error), error
    assert "Traceback" not in case.ranks.all_output


def test_a_stopped_rank_ends_when_it_is_woken(running):
    case = running["stopped"]
    case.end(START_S + 2 * TIMEOUT_S, 3)
    case.ranks.signal(3, signal.SIGCONT)
    assert case.ranks.end(10.0)[3] == EXIT_PEER_LOST


def test_rank_0_may_be_the_stopped_one(running):
    case = running["rank 0 stopped"]
    assert case.end(START_S + TIMEOUT_S + SILENT_S, 0)[1:] == [EXIT_PEER_LOST] * 2
    (error,) = case.ranks.errors
    assert re.match(rf"error: {NAMES[0]} on {HOST} was stopped by a signal", error), error


WATCH_LOST = {
    "judge killed": r"the judge of the watch on {} died \(process \d+\); ranks? [012]",
    "judge stopped": r"the judge of the watch on {} was stopped by a signal \(process \d+\); .*kill -9 \d+",
    "host's watch stopped": r"the watch on {} was stopped by a signal \(process \d+\); .*kill -9 \d+",
    "host's watch killed": r"the watch on {} died \(process \d+\); look for its signal in ",
}


@pytest.mark.parametrize("name", WATCH_LOST)
def test_a_process_of_the_watch_itself_that_is_lost_is_named(running, name):
    case = running[name]
    assert case.end(START_S + TIMEOUT_S + 2 * SILENT_S) == [EXIT_PEER_LOST] * 3
    (error,) = case.ranks.errors
    assert re.match("error: " + WATCH_LOST[name].format(HOST), error), error
    assert "Traceback" not in case.ranks.all_output


def test_a_job_that_was_paused_goes_on(running):
    """By a batch system that gives the machines to another one for longer than a rank may be silent."""
    case = running["paused"]
    time.sleep(max(0.0, case.began_s + 2 * TIMEOUT_S - time.monotonic()))
    for rank in range(3):
        case.ranks.signal(rank, signal.SIGCONT)
    time.sleep(TIMEOUT_S / 2)
    assert [process.exitcode for process in case.ranks.processes] == [None] * 3, case.ranks.all_output
    case.ranks.signal(1, signal.SIGKILL)  # and the watch still watches
    assert case.ranks.end(20.0) == [EXIT_PEER_LOST, -signal.SIGKILL, EXIT_PEER_LOST]
    (error,) = case.ranks.errors
    assert error.startswith("error: rank 1 (pipe 0, data 0, model 1) on "), error


def test_ranks_in_different_collectives_are_named_with_both(running):
    """Rank 3 waits in one that rank 1 does not join, which sends to it; 0 and 2 only wait behind them."""
    case = running["different"]
    assert case.end(START_S + TIMEOUT_S) == [EXIT_PEER_LOST] * 4
    (error,) = case.ranks.errors
    assert re.match(rf"error: {NAMES[1]} and {NAMES[3]} on {HOST} wait for each other since 10 s: ", error), error
    assert re.search(r"rank 1 waits in send at \S+:\d+ work, rank 3 waits in all_reduce at ", error), error


def test_a_rank_that_ends_too_early_is_named(running):
    case = running["return_early"]
    assert case.end(START_S + TIMEOUT_S) == [EXIT_PEER_LOST] * 4
    (error,) = case.ranks.errors
    assert re.match(rf"error: {NAMES[0]} on {HOST} ended in step 3, and others still wait", error), error


@pytest.mark.parametrize(("name", "rank"), [("raise_runtime_error", 1), ("rank 0 fails", 0)])
def test_a_bug_of_one_rank_shows_one_traceback(running, name, rank):
    case = running[name]
    assert case.end(START_S + 2 * SILENT_S) == [1 if r == rank else EXIT_PEER_LOST for r in range(3)]
    assert case.ranks.errors == []
    assert case.ranks.output(rank).count("Traceback") == 1 and "Error: a bug" in case.ranks.output(rank)
    assert case.ranks.all_output.count("Traceback") == 1


def test_an_error_that_one_rank_meets_is_one_line_of_that_rank(running):
    case = running["raise_user_error"]
    assert case.end(START_S + 2 * SILENT_S) == [EXIT_USER] * 3
    assert case.ranks.errors == ["error: rank 1 (pipe 0, data 0, model 1): the disk is full; make room"]
    assert "Traceback" not in case.ranks.all_output


@pytest.mark.parametrize("name", ["rank 0 last", "rank 2 last"])
def test_ranks_may_end_at_different_times(running, name):
    case = running[name]
    assert case.end(START_S + 2 * TIMEOUT_S) == [0, 0, 0]
    assert case.ranks.errors == [] and "Traceback" not in case.ranks.all_output


@pytest.mark.parametrize(
    ("absent", "told"),
    [
        (1, r"2 of 3 processes came within 10 s; missing: rank 1 \(pipe 0, data 0, model 1\)"),
        (0, r"no answer from rank 0 at 127.0.0.1:\d+ \(MASTER_ADDR, MASTER_PORT\) within 10 s"),
    ],
)
def test_who_does_not_come_at_the_start_is_named(running, absent, told):
    case = running[f"rank {absent} missing"]
    codes = case.end(START_S + TIMEOUT_S + SILENT_S, absent)
    assert [code for rank, code in enumerate(codes) if rank != absent] == [EXIT_PEER_LOST] * 2
    (error,) = case.ranks.errors
    assert re.match(f"error: {told}", error), error


def test_what_is_known_is_written_down(running):
    case = running["exit_unseen"]
    case.end(START_S)
    (file,) = (case.ranks.folder / "faults").iterdir()
    known = json.loads(file.read_text())
    assert [f"error: {known['message']}"] == case.ranks.errors
    assert [r["state"] for r in known["ranks"]] == ["runs", "runs", "runs", "died"]
    assert "collectives.py" in " ".join(known["ranks"][2]["stack"])
    assert known["flight_recorder"]["2"]["groups"]


@pytest.mark.parametrize("slow_rank", [2, -1])
def test_a_slow_rank_is_named_and_equal_ones_are_not(tmp_path, slow_rank):
    with start(tmp_path, uneven, (1, 4, 1), Limits(window_s=1.0), tmp_path, slow_rank) as ranks:
        assert ranks.end(120.0) == [0] * 4
    notes = [line for line in ranks.all_output.splitlines() if line.startswith("note: ")]
    if slow_rank == -1:
        assert notes == []
    else:
        (note,) = notes
        assert re.match(rf"note: rank 2 \(pipe 0, data 2, model 0\) on {HOST} is slow: busy for \d+ ms of a", note), (
            note
        )
