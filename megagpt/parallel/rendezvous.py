"""How the processes of a run find each other: all meet at a store of rank 0, and who does not come is named."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

from megagpt.parallel.agree import RankError

MAX_NAMED = 8


def meet(
    rank: int, n_ranks: int, timeout_s: float, name: Callable[[int], str], here: str
) -> tuple[dist.Store, list[str]]:
    """The store of all processes, and what each of them gave as `here`, in rank order.

    name: of any rank, for messages.
    Comm: through the store, which rank 0 opens at MASTER_ADDR:MASTER_PORT, or torchrun before it.
    Raises RankError when some rank, or rank 0 and its store, is not there within timeout_s.
    """
    store = open_store(rank, timeout_s)
    store.set(f"arrived/{rank}", here)
    keys = [f"arrived/{r}" for r in range(n_ranks)]
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:  # a timeout, or rank 0 is gone and its store with it
        raise _who_is_missing(store, rank, keys, timeout_s, name) from error
    return dist.PrefixStore("default_pg", store), [text.decode() for text in store.multi_get(keys)]


def _who_is_missing(
    store: dist.Store, rank: int, keys: list[str], timeout_s: float, name: Callable[[int], str]
) -> RankError:
    try:
        arrived = [r for r, key in enumerate(keys) if store.check([key])]
    except RuntimeError:
        return RankError("rank 0 ended before all processes had come; see its output", speaks=False)
    missing = [r for r in range(len(keys)) if r not in arrived]
    named = ", ".join(name(r) for r in missing[:MAX_NAMED]) + ", …" * (len(missing) > MAX_NAMED)
    return RankError(
        f"{len(arrived)} of {len(keys)} processes came within {timeout_s:g} s; missing: {named}; see their output, "
        "and that every host was started with the same number of processes",
        speaks=rank == min(arrived),
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
                    f"({error.strerror or error}); see its output, and that {socket.gethostname()} reaches that "
                    "address",
                    speaks,
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
