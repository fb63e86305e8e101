"""How the processes of a run find each other: all meet at a store of rank 0, and who does not come is named.

torchrun keeps one store for all its restarts (pytorch/pytorch#135712), and the number of a restart that it gives is not
the same on every host: new processes would find the addresses of dead ones. So each start is a meeting of its own: rank
0 names it by a number never used before, and opens it with a list of who is there. Who finds the name of an old meeting
is not on that one's list, and looks again.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megagpt.errors import EXIT_PEER_LOST
from megagpt.files import os_reason
from megagpt.processes.agree import RankError

MAX_NAMED = 8
MEETING, ARRIVED, LOOKED, OPEN = "megagpt/meeting", "arrived/{}", "looked/{}", "open"  # keys of the store
NOTE_S = 30.0  # so often those who wait say for whom
GONE_S = 20.0  # who has come looks at least every LAST_PAUSE_S whether all have; if not for so long, it has ended
PAUSE_S = 0.25  # between two of rank 0's looks at who has come
RESOLVE_S = 10.0  # for which an unknown name may become known, as those of containers do
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
            present = _attend(meeting, rank, n_ranks, timeout_s, name, me)
            if me in present:
                return dist.PrefixStore("default_pg", meeting), [there for _, there in present]
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_PAUSE_S)
    except (TimeoutError, RuntimeError) as error:  # RuntimeError: rank 0 is gone, and its store with it
        raise _who_is_missing(meeting, n_ranks, timeout_s, name) from error
    raise _who_is_missing(meeting, n_ranks, timeout_s, name)


def _attend(
    meeting: dist.Store, rank: int, n_ranks: int, timeout_s: float, name: Callable[[int], str], me: list[str]
) -> list[list[str]]:
    """Come to a meeting, which rank 0 opens when all have; who is there, by rank: nobody while it is not open."""
    meeting.add(LOOKED.format(rank), 1)
    meeting.set(ARRIVED.format(rank), json.dumps(me))
    if rank == 0:
        _wait_for_all(meeting, n_ranks, timeout_s, name)
        there = meeting.multi_get([ARRIVED.format(r) for r in range(n_ranks)])
        meeting.set(OPEN, json.dumps([json.loads(text) for text in there]))
    return json.loads(meeting.get(OPEN)) if meeting.check([OPEN]) else []


def _wait_for_all(meeting: dist.Store, n_ranks: int, timeout_s: float, name: Callable[[int], str]) -> None:
    """Until all ranks have come.  Raises TimeoutError, or RankError for one that has come and gone again.

    `Store.wait` with a timeout would also print lines of C++ when that is over.
    """
    began_s, note_s = time.monotonic(), NOTE_S
    looks, still_s = {}, dict.fromkeys(range(1, n_ranks), 0.0)
    while not meeting.check([ARRIVED.format(r) for r in range(n_ranks)]):
        waited_s = time.monotonic() - began_s
        if waited_s > timeout_s:
            raise TimeoutError
        missing = _missing(meeting, n_ranks)
        if waited_s > note_s:
            print(f"still waiting for {_named(missing, name)}; {note_s:g} of {timeout_s:g} s are over", flush=True)
            note_s += NOTE_S
        for rank in still_s.keys() - set(missing):
            n_looks = meeting.add(LOOKED.format(rank), 0)
            still_s[rank] = still_s[rank] + PAUSE_S if n_looks == looks.get(rank) else 0.0
            looks[rank] = n_looks
            if still_s[rank] > GONE_S:
                raise RankError(f"{name(rank)} came and ended before all had come; see its output", code=EXIT_PEER_LOST)
        time.sleep(PAUSE_S)


def _missing(meeting: dist.Store, n_ranks: int) -> list[int]:
    return [rank for rank in range(n_ranks) if not meeting.check([ARRIVED.format(rank)])]


def _named(ranks: list[int], name: Callable[[int], str]) -> str:
    return ", ".join(name(rank) for rank in ranks[:MAX_NAMED]) + ", …" * (len(ranks) > MAX_NAMED)


def _who_is_missing(
    meeting: dist.Store | None, n_ranks: int, timeout_s: float, name: Callable[[int], str]
) -> RankError:
    try:
        missing = _missing(meeting, n_ranks) if meeting else list(range(n_ranks))
        # Those that came later also give up later: the first one speaks, before a launcher ends it for another's end.
        speaks = bool(meeting) and meeting.add("gave up", 1) == 1
    except RuntimeError:
        return RankError(
            "rank 0 ended before all processes had come; see its output", speaks=False, code=EXIT_PEER_LOST
        )
    if 0 in missing or not missing:  # no meeting, or one of the start before
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        return RankError(
            f"{name(0)} did not come within {timeout_s:g} s; see its output", speaks=speaks, code=EXIT_PEER_LOST
        )
    return RankError(
        f"{n_ranks - len(missing)} of {n_ranks} processes came within {timeout_s:g} s; missing: "
        f"{_named(missing, name)}; see their output, and that every host was started with the same number of processes",
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
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    addresses = _addresses(host, port, speaks=first_here)
    if not is_host:
        _wait_for(host, port, timeout_s, speaks=first_here or rank == 1)
    try:
        return _in_time(
            timeout_s,
            lambda: dist.TCPStore(
                host,
                port,
                is_master=is_host,
                timeout=timedelta(seconds=timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=_listen(addresses) if is_host else None,
            ),
        )
    except TimeoutError:
        raise RankError(
            f"{host}:{port} (MASTER_ADDR, MASTER_PORT) takes connections, and gave no answer as a store within "
            f"{timeout_s:g} s; give a port that no other program has, and keep strangers from it",
            speaks=first_here or rank == 1,
            code=EXIT_PEER_LOST,
        ) from None
    except RuntimeError as error:
        raise RankError(
            f"cannot open {host}:{port} (MASTER_ADDR, MASTER_PORT): {str(error).splitlines()[0]}"
        ) from error


def _in_time(timeout_s: float, open_it: Callable[[], dist.Store]) -> dist.Store:
    """What open_it returns or raises.  Raises TimeoutError: a store's first question waits without end for its answer.

    No answer comes where another program listens, or where thousands of strangers wait before us: torch's store asks
    DNS for the name of each, one after the other.
    """
    answers: queue.SimpleQueue[dist.Store | RuntimeError] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(open_it())
        except RuntimeError as error:
            answers.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, RuntimeError):
        raise answer
    return answer


def _wait_for(host: str, port: int, timeout_s: float, speaks: bool) -> None:
    """Until somebody listens there. TCPStore would wait as well, and fail with some 40 lines of C++."""
    began_s, note_s = time.monotonic(), NOTE_S
    while True:
        try:
            socket.create_connection((host, port), timeout=min(timeout_s, 5.0)).close()
            return
        except OSError as error:
            if time.monotonic() > began_s + timeout_s:
                raise RankError(
                    f"no answer from rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout_s:g} s "
                    f"({os_reason(error)}); see its output, and that {socket.gethostname()} reaches that "
                    "address",
                    speaks=speaks,
                    code=EXIT_PEER_LOST,
                ) from None
        if speaks and time.monotonic() > began_s + note_s:
            print(f"still waiting for rank 0 at {host}:{port}; {note_s:g} of {timeout_s:g} s are over", flush=True)
            note_s += NOTE_S
        time.sleep(0.2)


def _addresses(host: str, port: int, speaks: bool) -> list[tuple[Any, ...]]:
    """What `getaddrinfo` says of the name, which may take a moment to become known.  Raises RankError."""
    end_s = time.monotonic() + RESOLVE_S
    while True:
        try:
            return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: it cannot be a name
            if isinstance(error, UnicodeError) or time.monotonic() > end_s:
                reason = os_reason(error) if isinstance(error, OSError) else error
                raise RankError(
                    f"MASTER_ADDR={host} is no host that {socket.gethostname()} knows ({reason}); give the name or "
                    "address of rank 0's host, as every host knows it",
                    speaks=speaks,
                    code=EXIT_PEER_LOST,
                ) from None
        time.sleep(0.2)


def _listen(addresses: list[tuple[Any, ...]]) -> int | None:
    """A socket that listens on the first of these that is one of this machine.

    None, for torch to listen on every interface, where that is no address of this machine, or its port is taken; by
    a store of this process, which torch then shares, or by another one, which it says.
    """
    for family, kind, _, _, address in addresses:
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
