"""How the processes of a run find each other: all meet at a store of rank 0, and who does not come is named.

torchrun keeps one store for all its restarts (pytorch/pytorch#135712), and the number of a restart that it gives is not
the same on every host: new processes would find the addresses of dead ones. So each start is a meeting of its own: rank
0 names it by a number never used before, and opens it with a list of who is there. Who finds the name of an old meeting
is not on that one's list, and looks again.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megagpt.errors import EXIT_PEER_LOST
from megagpt.files import os_reason
from megagpt.processes.agree import RankError

MAX_NAMED = 8
MEETING, ARRIVED, OPEN = "megagpt/meeting", "arrived/{}", "open"  # keys of the store
FIRST_PAUSE_S, LAST_PAUSE_S = 0.01, 0.5  # between two looks at it


def meet(
    rank: int, n_ranks: int, timeout_s: float, name: Callable[[int], str], here: str
) -> tuple[dist.Store, list[str]]:
    """The store of all processes, and what each of them gave as `here`, in rank order.

    name: of any rank, for messages.
    Comm: through the store, which rank 0 opens at MASTER_ADDR:MASTER_PORT, or torchrun before it.
    Raises RankError when some rank, or rank 0 and its store, is not there within timeout_s.
    """
    store = open_store(rank, timeout_s)
    deadline, pause_s = time.monotonic() + timeout_s, FIRST_PAUSE_S
    me = [secrets.token_hex(8), here]
    if rank == 0:
        store.set(MEETING, me[0])
    meeting = None
    try:
        while time.monotonic() < deadline:
            meeting = dist.PrefixStore(store.get(MEETING).decode(), store)
            present = _attend(meeting, rank, n_ranks, timeout_s, me)
            if me in present:
                return dist.PrefixStore("default_pg", meeting), [there for _, there in present]
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
    except (TimeoutError, RuntimeError) as error:  # RuntimeError: rank 0 is gone, and its store with it
        raise _who_is_missing(meeting, n_ranks, timeout_s, name) from error
    raise _who_is_missing(meeting, n_ranks, timeout_s, name)


def _attend(meeting: dist.Store, rank: int, n_ranks: int, timeout_s: float, me: list[str]) -> list[list[str]]:
    """Come to a meeting, which rank 0 opens when all have; who is there, by rank: nobody while it is not open."""
    meeting.set(ARRIVED.format(rank), json.dumps(me))
    if rank == 0:
        keys = [ARRIVED.format(r) for r in range(n_ranks)]
        _wait_for_all(meeting, keys, timeout_s)
        meeting.set(OPEN, json.dumps([json.loads(text) for text in meeting.multi_get(keys)]))
    return json.loads(meeting.get(OPEN)) if meeting.check([OPEN]) else []


def _wait_for_all(store: dist.Store, keys: list[str], timeout_s: float) -> None:
    """Until all keys are there. `Store.wait` with a timeout would also print lines of C++ when that is over."""
    end_s = time.monotonic() + timeout_s
    while not store.check(keys):
        if time.monotonic() > end_s:
            raise TimeoutError
        time.sleep(0.1)


def _who_is_missing(
    meeting: dist.Store | None, n_ranks: int, timeout_s: float, name: Callable[[int], str]
) -> RankError:
    try:
        arrived = [r for r in range(n_ranks) if meeting and meeting.check([ARRIVED.format(r)])]
        # Those that came later also give up later: the first one speaks, before a launcher ends it for another's end.
        speaks = bool(meeting) and meeting.add("gave up", 1) == 1
    except RuntimeError:
        return RankError(
            "rank 0 ended before all processes had come; see its output", speaks=False, code=EXIT_PEER_LOST
        )
    missing = [r for r in range(n_ranks) if r not in arrived]
    if 0 in missing or not missing:  # no meeting, or one of the start before
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        return RankError(
            f"{name(0)} did not come within {timeout_s:g} s; see its output", speaks=speaks, code=EXIT_PEER_LOST
        )
    named = ", ".join(name(r) for r in missing[:MAX_NAMED]) + ", …" * (len(missing) > MAX_NAMED)
    return RankError(
        f"{len(arrived)} of {n_ranks} processes came within {timeout_s:g} s; missing: {named}; see their output, "
        "and that every host was started with the same number of processes",
        speaks=speaks,
        code=EXIT_PEER_LOST,
    )


def open_store(rank: int, timeout_s: float) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT: rank 0 hosts it, or torchrun, and then all ranks are clients.

    Where rank 0 is host, it listens on that address alone, and not on every interface as torch's own would: it
    authenticates nobody. timeout_s: of the connection, and of each later call of the store.
    Raises RankError where it cannot be opened; one rank of each machine speaks, since they cannot agree on it.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent keeps it
    is_host = rank == 0 and not has_store
    if not is_host:
        _wait_for(host, port, timeout_s, speaks=os.environ.get("LOCAL_RANK", "0") == "0" or rank == 1)
    try:
        return dist.TCPStore(
            host,
            port,
            is_master=is_host,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
            master_listen_fd=_listen(host, port) if is_host else None,
        )
    except RuntimeError as error:
        raise RankError(
            f"cannot open {host}:{port} (MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}"
        ) from error


def _wait_for(host: str, port: int, timeout_s: float, speaks: bool) -> None:
    """Until somebody listens there. TCPStore would wait as well, and fail with some 40 lines of C++."""
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host, port), timeout=min(timeout_s, 5.0)).close()
            return
        except OSError as error:
            if time.monotonic() > end_s:
                raise RankError(
                    f"no answer from rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout_s:g} s "
                    f"({os_reason(error)}); see its output, and that {socket.gethostname()} reaches that "
                    "address",
                    speaks=speaks,
                    code=EXIT_PEER_LOST,
                ) from None
        time.sleep(0.2)


def _listen(host: str, port: int) -> int | None:
    """A socket that listens on that address.

    None, for torch to listen on every interface, where that is no address of this machine, or its port is taken; by
    a store of this process, which torch then shares, or by another one, which it says.
    """
    for family, kind, _, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError:
            listener.close()
            continue
        listener.listen(4096)
        return listener.detach()
    return None
