"""What ranks tell each other, and which hosts they reach, before they are connected.

`Board` is JSON over the rendezvous store, collected by rank 0. `unreachable` tries a plain TCP connection to the
address that gloo or NCCL would use: where that fails, they would hang or fail later, and not say between whom.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch.distributed import Store

from megagpt.errors import UserError
from megagpt.processes.agree import RankError

GIVEN_UP = "given up"  # a key: rank 0 has said why, and goes
LAST_WORD_S = 1.0  # the store goes with rank 0: so long it stays for the others to read what it said


@dataclass(frozen=True)
class Board:
    """Needs nothing but the store: it works where collectives would hang, and says who is missing."""

    store: Store
    rank: int
    world_size: int
    timeout_s: float

    def gather(self, topic: str, value: Any) -> list[Any]:
        """Every rank's JSON-able value, in rank order, on rank 0; an empty list on the others.

        Comm: one key a rank.  Raises UserError on rank 0, naming the ranks that told nothing within the timeout.
        """
        self.store.set(f"{topic}/{self.rank}", json.dumps(value))
        if self.rank != 0:
            return []
        keys = [f"{topic}/{rank}" for rank in range(self.world_size)]
        if not self._came(keys, self.timeout_s):
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            self.store.set(GIVEN_UP, "")
            time.sleep(LAST_WORD_S)
            raise UserError(
                f"{self.world_size - len(missing)} of {self.world_size} ranks came within {self.timeout_s:.0f} s; "
                f"missing: {ranks_text(missing)}; look at their hosts' output, and at their way to this one's port"
            )
        return [json.loads(self.store.get(key)) for key in keys]

    def share(self, topic: str, value: Any = None) -> Any:
        """Rank 0's value, on every rank. Comm: one key, read by all.

        Raises RankError, silent, where rank 0 does not say anything: it has said why.
        """
        if self.rank == 0:
            self.store.set(topic, json.dumps(value))
            return value
        try:
            if self._came([topic], 2 * self.timeout_s) and not self.store.check([GIVEN_UP]):
                return json.loads(self.store.get(topic))
        except RuntimeError:  # the store went with rank 0
            pass
        raise RankError(f"rank 0 did not say {topic}", speaks=False)

    def _came(self, keys: list[str], timeout_s: float) -> bool:
        """Whether all keys are there within the time. Asks again and again: a wait that fails logs lines of C++."""
        end_s = time.monotonic() + timeout_s
        while not self.store.check(keys) and not self.store.check([GIVEN_UP]):
            if time.monotonic() > end_s:
                return False
            time.sleep(0.05)
        return True


def ranks_text(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    spans = [str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts]
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(spans)


CONNECT_S = 5.0
HANG_UP_S = 0.1  # between two looks whether anybody is to be hung up on still
_SIOCGIFADDR = 0x8915  # Linux: the IPv4 address of an interface


@dataclass(frozen=True)
class Address:
    """Where this rank is reached. problem: why that is wrong, with a remedy; None where nothing is."""

    ip: str
    problem: str | None = None


def own_address(backend: str, n_hosts: int) -> Address:
    """The address that the backend ("gloo" or "nccl") will speak from on this host."""
    host = socket.gethostname()
    variable = "NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
    wanted = os.environ.get(variable, "")
    interfaces = {name: _ip_of(name) for _, name in socket.if_nameindex()}
    if wanted:
        names = matching(wanted, list(interfaces), prefixes=backend == "nccl")
        for name in names:
            if interfaces[name]:
                return Address(interfaces[name])
        have = ", ".join(f"{name} ({ip})" for name, ip in interfaces.items() if ip)
        problem = f"{variable}={wanted} is no interface with an address on {host}, which has {have}"
        return Address(_route(), f"{problem}; set it to the one between the hosts")
    if backend == "nccl":
        return Address(_route())
    try:
        ip = socket.gethostbyname(host)
    except OSError:
        ip = "127.0.0.1"  # gloo falls back to it too
    if n_hosts > 1 and ip.startswith("127."):
        problem = f"gloo would use {ip}, which the name {host} resolves to and no other host reaches"
        return Address(_route(), f"{problem}; set GLOO_SOCKET_IFNAME to the interface between the hosts")
    return Address(ip)


def matching(wanted: str, names: list[str], prefixes: bool) -> list[str]:
    """The interfaces that a list selects: gloo's exact names, or NCCL's prefixes, with ^ for not and = for exact."""
    if not prefixes:
        return [name for name in wanted.split(",") if name in names]
    negated, exact = wanted.startswith("^"), wanted.lstrip("^").startswith("=")
    words = wanted.lstrip("^").lstrip("=").split(",")

    def fits(name: str) -> bool:
        return any(name == word if exact else name.startswith(word) for word in words)

    return [name for name in names if fits(name) != negated]


def listen(ip: str) -> socket.socket:
    """A socket that others may connect to; close it when all have.

    Whoever connects, a rank or a stranger, is hung up on at once: nobody can fill the queue of connections.
    """
    listener = socket.socket()
    try:
        listener.bind((ip, 0))
    except OSError:  # not an address of this host after all: the others' attempts will show it
        listener.bind(("", 0))
    listener.listen(1024)
    listener.settimeout(HANG_UP_S)
    threading.Thread(target=_hang_up, args=(listener,), daemon=True).start()
    return listener


def _hang_up(listener: socket.socket) -> None:
    while listener.fileno() != -1:  # until it is closed
        with suppress(OSError):  # nobody came in time, or went again
            listener.accept()[0].close()


def unreachable(rank: int, places: list[dict]) -> list[int]:
    """The ranks, one on every other host, to which this rank cannot connect.

    places: of every rank, "host", "ip" and "port". Each rank tries the one in its own position on each host, so that
    all of a host's ranks are tried by somebody.
    """
    hosts: dict[str, list[int]] = {}
    for number, place in enumerate(places):
        hosts.setdefault(place["host"], []).append(number)
    own = hosts.pop(places[rank]["host"])
    peers = [ranks[own.index(rank) % len(ranks)] for ranks in hosts.values()]
    if not peers:
        return []
    with ThreadPoolExecutor(max_workers=min(32, len(peers))) as pool:
        reached = pool.map(lambda peer: _connects(places[peer]["ip"], places[peer]["port"]), peers)
        return [peer for peer, ok in zip(peers, reached, strict=True) if not ok]


def _connects(ip: str, port: int) -> bool:
    try:
        socket.create_connection((ip, port), timeout=CONNECT_S).close()
    except OSError:
        return False
    return True


def _ip_of(interface: str) -> str:
    """Its IPv4 address, "" where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def _route() -> str:
    """The address from which this host reaches the rendezvous. Sends nothing: connecting UDP only picks a route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((os.environ["MASTER_ADDR"], 9))
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]
