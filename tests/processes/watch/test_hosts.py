"""Hosts whose watch, judge or deputy is lost: exactly one of those that are left speaks.

Real processes of the watch, all on this machine; ranks that only give signs of life. All cases run at once, since most
of their time is waiting.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from megagpt.errors import EXIT_PEER_LOST
from megagpt.parallel.naming import rank_name
from megagpt.processes.watch.host import HostWatch
from megagpt.processes.watch.judge import Judge
from megagpt.processes.watch.limits import Limits
from megagpt.processes.watch.wire import Wire

N_HOSTS = 4
TOKEN = "00c0ffee"
KILL, STOP = signal.SIGKILL, signal.SIGSTOP
PATIENT = Limits()
QUICK = Limits(heartbeat_timeout_s=4.0)
HOST = re.escape(socket.gethostname())
JUDGE = -1  # among the processes; the others are the hosts' numbers


def be(number: int, limits: Limits, judge_listener: socket.socket, listeners: list[socket.socket], errors: str) -> None:
    """The judge, or a host's watch."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    names = [rank_name(rank, dp=N_HOSTS, tp=1) for rank in range(N_HOSTS)]
    if number == JUDGE:
        for each in listeners:
            each.close()
        Judge(judge_listener, TOKEN, [[rank] for rank in range(N_HOSTS)], names, [], limits).run()
    else:
        judge = Wire(socket.create_connection(judge_listener.getsockname()))
        judge_listener.close()
        HostWatch(number, N_HOSTS, {number: names[number]}, listeners[number], TOKEN, judge, limits).run()
    os._exit(0)


class Run:
    """A rank on each host, as the test plays it."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self._folder = folder
        context = multiprocessing.get_context("fork")
        listeners = [socket.create_server(("127.0.0.1", 0)) for _ in range(N_HOSTS)]
        with socket.create_server(("127.0.0.1", 0), backlog=N_HOSTS) as judge:
            self.processes = {
                n: context.Process(target=be, args=(n, limits, judge, listeners, str(folder / f"{n}.txt")))
                for n in range(JUDGE, N_HOSTS)
            }
            for process in self.processes.values():
                process.start()
        self._ranks = [Wire(socket.create_connection(each.getsockname())) for each in listeners]
        for each in listeners:
            each.close()
        for rank in self._ranks:
            rank.socket.settimeout(0.01)
            rank.send(token=TOKEN, number=0, host="h", pid=os.getpid())
        self.codes: dict[int, int] = {}
        self.lost: Sequence[int] = ()  # ranks that live no more

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.join()
        for rank in self._ranks:
            rank.close()

    def turn(self) -> None:
        """The ranks live, each of them at its host's place, until they are told to end."""
        for number, rank in enumerate(self._ranks):
            if number in self.lost or number in self.codes:
                continue
            beat = {"step": "in step 3", "place": f"a.py:{number} f", "collective": None, "still_s": 0.0}
            rank.send(beat=beat)
            for message in self._hear(rank):
                if "where" in message:
                    answer = {"waits_for": [], "stack": [], "collective": None, "flight_recorder": {}}
                    rank.send(beat=beat, answer=answer)
                if "verdict" in message:
                    self.codes[number] = message["verdict"]["exit"]
                    rank.close()

    @property
    def has_ended(self) -> bool:
        return len(self.codes) == N_HOSTS - len(self.lost)

    @staticmethod
    def _hear(rank: Wire) -> list[dict]:
        try:
            data = rank.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        return rank.read(data)

    def messages(self) -> list[str]:
        found = []
        for path in self._folder.iterdir():
            found += path.read_text().splitlines()
        return found


@dataclass(frozen=True)
class Case:
    """Which processes get which signal, which ranks are lost by that, and what begins the messages of how many."""

    processes: Sequence[int]
    number: int
    lost: Sequence[int]
    message: str
    limits: Limits = PATIENT
    n_messages: int = 1


WHOLE = rf"rank 0 \(pipe 0, data 0, model 0\) on {HOST} {{}} \(process \d+, last seen in step 3 at a.py:0 f"
CUT = rf"rank 2 \(.*\) on {HOST} gave no sign of life for 4 s \(.*see whether {HOST}, its watch \(process \d+\) and "
CASES = {
    "judge killed": Case([JUDGE], KILL, [], rf"the judge of the watch on {HOST} died \(process \d+\); rank"),
    "judge stopped": Case([JUDGE], STOP, [], rf"the judge of the watch on {HOST} was stopped by a signal ", QUICK),
    "its host dies": Case([JUDGE, 0], KILL, [0], WHOLE.format("died")),
    "its host is cut off": Case([JUDGE, 0], STOP, [0], WHOLE.format("gave no sign of life for 4 s"), QUICK),
    "the deputy dies": Case([1], KILL, [1], rf"the watch on {HOST} died \(process \d+\)"),
    "a host's watch stops": Case([2], STOP, [2], CUT, QUICK),
    "judge and deputy die": Case([JUDGE, 0, 1], KILL, [0, 1], rf"the judge of the watch on {HOST} died ", n_messages=2),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[dict[str, Run]]:
    """All cases, ended."""
    found = {name: Run(tmp_path_factory.mktemp("run"), case.limits) for name, case in CASES.items()}
    play(found.values(), 8.0)  # four pulses: with them comes what hosts know of the judge's own
    for name, case in CASES.items():
        for process in case.processes:
            os.kill(found[name].processes[process].pid or 0, case.number)
        found[name].lost = case.lost
    play(found.values(), 60.0)
    yield found
    for run in found.values():
        run.close()


def play(runs: Iterable[Run], seconds: float) -> None:
    """For so long, or until all have ended."""
    end_s = time.monotonic() + seconds
    while time.monotonic() < end_s and not all(run.has_ended for run in runs):
        for run in runs:
            run.turn()
        time.sleep(0.1)


@pytest.mark.parametrize("name", CASES)
def test_one_message_names_what_is_lost_of_the_watch(runs, name):
    run, case = runs[name], CASES[name]
    assert run.codes == {rank: EXIT_PEER_LOST for rank in range(N_HOSTS) if rank not in case.lost}
    errors = run.messages()
    assert len(errors) == case.n_messages, errors
    assert all(re.match(f"error: {case.message}", error) for error in errors), errors
