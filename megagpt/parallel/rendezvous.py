"""How the processes of a run find each other: all meet at a store of rank 0, and who does not come is named."""

from __future__ import annotations

import os
import socket
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
    store = _open_store(rank, n_ranks, timeout_s)
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


def _open_store(rank: int, n_ranks: int, timeout_s: float) -> dist.Store:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent keeps it
    try:
        return dist.TCPStore(
            host,
            port,
            n_ranks,
            is_master=rank == 0 and not has_store,
            timeout=timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )
    except RuntimeError as error:
        if rank == 0:
            raise RankError(
                f"cannot listen on {host}:{port} (MASTER_ADDR, MASTER_PORT): {_first_line(error)}"
            ) from error
        raise RankError(
            f"no answer from rank 0 at {host}:{port} (MASTER_ADDR, MASTER_PORT) within {timeout_s:g} s; see its "
            f"output, and that {socket.gethostname()} reaches that address",
            speaks=os.environ.get("LOCAL_RANK", "0") == "0" or rank == 1,
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0]
