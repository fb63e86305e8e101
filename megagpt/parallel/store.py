"""The store by which ranks find each other, opened so that it listens where it must and nowhere else."""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta

from torch.distributed import TCPStore

from megagpt.parallel.agree import RankError


def open_store(timeout_s: float) -> TCPStore:
    """The store that the launcher's environment names (MASTER_ADDR, MASTER_PORT, RANK); rank 0 hosts it.

    torchrun hosts it itself, and then all ranks are clients. Where rank 0 is host, the store listens on the address
    MASTER_ADDR alone, and not on every interface as torch's own would: it authenticates nobody.

    timeout_s: of the connection, and of each later call of the store.
    Raises RankError where it cannot be reached; one rank of each host speaks, since they cannot agree on it.
    """
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    hosts_it = os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    if not hosts_it:
        _wait_for(address, port, timeout_s)
    return TCPStore(
        address,
        port,
        is_master=hosts_it,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,  # who comes and who does not is asked afterwards, and told by name
        multi_tenant=True,  # torch may open it once more in this process
        master_listen_fd=_listening(address, port) if hosts_it else None,
    )


def _wait_for(address: str, port: int, timeout_s: float) -> None:
    """Until somebody listens there. TCPStore would wait as well, and fail with some 40 lines of C++."""
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((address, port), timeout=min(timeout_s, 5.0)).close()
            return
        except OSError as error:
            if time.monotonic() > end_s:
                raise RankError(
                    f"{socket.gethostname()} cannot reach the rendezvous at {address}:{port} within {timeout_s:.0f} s "
                    f"({error.strerror or error}); check that the first host runs, that its name resolves here, and "
                    f"that no firewall closes the port",
                    speaks=os.environ.get("LOCAL_RANK", "0") == "0",
                ) from None
        time.sleep(0.2)


def _listening(address: str, port: int) -> int | None:
    """A listening socket of that address; None (torch then listens on all) where it is no address of this host."""
    found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    for family, kind, _, _, place in found:
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(place)
        except OSError:
            listener.close()
            continue
        listener.listen(4096)
        return listener.detach()
    return None
