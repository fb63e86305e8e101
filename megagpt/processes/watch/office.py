"""The processes of the watch that are no ranks: started by the first rank of each machine, they end with the ranks.

    python -S -P -m megagpt.processes.watch.office < ERRAND

They import no torch, share no lock of Python with a rank, and heed no signal that asks the run to end: what ends them
is the end of their connections. On rank 0's machine the process is the judge, and forks the one for its host.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megagpt.errors import EXIT_PEER_LOST
from megagpt.files import os_reason
from megagpt.parallel.naming import rank_name
from megagpt.processes.watch.host import HostWatch
from megagpt.processes.watch.judge import Judge
from megagpt.processes.watch.last_words import say
from megagpt.processes.watch.limits import Limits
from megagpt.processes.watch.wire import Wire

ROOT = Path(__file__).parents[3]
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Errand:
    """What the first rank of a machine asks for. number: of the host.

    listener: the file descriptor of the port that its ranks come to. judge_listener: of the one that hosts come to, on
    the judge's machine alone. judge: the address of that. hosts: the ranks of each. compares: it names slow ranks.
    """

    number: int
    token: str
    listener: int
    judge: tuple[str, int]
    judge_listener: int | None
    hosts: Sequence[Sequence[int]]
    pp: int
    dp: int
    tp: int
    limits: Limits
    compares: bool


def open_office(errand: Errand) -> subprocess.Popen[bytes]:
    """Start the process; it has taken over the listeners, which the caller may close. It ends with the judge's code."""
    descriptors = [errand.listener] + [errand.judge_listener] * (errand.judge_listener is not None)
    process = subprocess.Popen(
        [sys.executable, "-S", "-P", "-m", "megagpt.processes.watch.office"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        pass_fds=[fd for fd in descriptors if fd is not None],
        start_new_session=True,
    )
    assert process.stdin
    process.stdin.write(json.dumps(asdict(errand)).encode())
    process.stdin.close()
    return process


def main() -> int:
    """Serve the errand that stands on stdin, as the judge or as a host's watch; returns the exit code."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    said: dict[str, Any] = json.load(sys.stdin)
    said["limits"] = Limits(**said["limits"])
    errand = Errand(**said)
    listener = socket.socket(fileno=errand.listener)
    if errand.judge_listener is None:
        return _watch_host(errand, listener)
    judge_listener = socket.socket(fileno=errand.judge_listener)
    if os.fork() == 0:
        judge_listener.close()
        return _watch_host(errand, listener)
    listener.close()
    return _judge(errand, judge_listener)


def _judge(errand: Errand, listener: socket.socket) -> int:
    n_ranks, stage = sum(map(len, errand.hosts)), errand.dp * errand.tp
    names = [rank_name(rank, dp=errand.dp, tp=errand.tp) for rank in range(n_ranks)]
    stages = [range(first, first + stage) for first in range(0, n_ranks, stage)] if errand.compares else []
    return Judge(listener, errand.token, errand.hosts, names, stages, errand.limits).run()


def _watch_host(errand: Errand, listener: socket.socket) -> int:
    host, port = errand.judge
    try:
        connection = socket.create_connection((host, port), timeout=errand.limits.heartbeat_timeout_s)
    except OSError as error:
        say(
            f"{socket.gethostname()} does not reach the watch over the ranks at {host}:{port} ({os_reason(error)}); "
            "see rank 0's output, and open all ports between the hosts"
        )
        return EXIT_PEER_LOST
    names = {rank: rank_name(rank, dp=errand.dp, tp=errand.tp) for rank in errand.hosts[errand.number]}
    HostWatch(errand.number, len(errand.hosts), names, listener, errand.token, Wire(connection), errand.limits).run()
    return 0


if __name__ == "__main__":
    os._exit(main())
