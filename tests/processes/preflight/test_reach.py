"""Addresses, connections, and who is missing, between threads and interfaces of this machine."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from megagpt.errors import UserError
from megagpt.processes.preflight import reach
from megagpt.processes.preflight.reach import Board, ranks_text

NAMES = ["lo", "docker0", "eth0", "eth1", "eth10", "ib0"]


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("eth", ["eth0", "eth1", "eth10"]),
        ("eth1,ib", ["eth1", "eth10", "ib0"]),
        ("=eth1", ["eth1"]),
        ("=eth1,eth0", ["eth0", "eth1"]),
        ("^docker,lo", ["eth0", "eth1", "eth10", "ib0"]),
        ("^=eth1", ["lo", "docker0", "eth0", "eth10", "ib0"]),
    ],
)
def test_nccl_interfaces(wanted: str, found: list[str]):
    """As NCCL's documentation says of NCCL_SOCKET_IFNAME."""
    assert reach.matching(wanted, NAMES, prefixes=True) == found


def test_gloo_interfaces_are_exact():
    assert reach.matching("eth1,ib0", NAMES, prefixes=False) == ["eth1", "ib0"]
    assert reach.matching("eth", NAMES, prefixes=False) == []


def test_the_own_address(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert reach.own_address("gloo", n_hosts=2) == reach.Address("127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth77")
    problem = reach.own_address("gloo", n_hosts=1).problem
    assert problem and "GLOO_SOCKET_IFNAME=eth77 is no interface" in problem and "lo (127.0.0.1)" in problem


def test_a_name_that_resolves_to_itself_alone_does_not_do_for_several_hosts(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostbyname", lambda name: "127.0.1.1")
    assert reach.own_address("gloo", n_hosts=1).problem is None
    problem = reach.own_address("gloo", n_hosts=2).problem
    assert problem and "127.0.1.1" in problem and "set GLOO_SOCKET_IFNAME" in problem


def test_each_rank_tries_one_of_each_other_host():
    with reach.listen("127.0.0.1") as open_one, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # not listening: a connection is refused
        ok, bad = open_one.getsockname()[1], closed.getsockname()[1]
        ports = {0: ok, 1: bad, 2: ok, 3: bad}
        places = [{"host": "ab"[rank // 2], "ip": "127.0.0.1", "port": port} for rank, port in ports.items()]
        places.append({"host": "c", "ip": "127.0.0.1", "port": ok})
        assert [reach.unreachable(rank, places) for rank in range(5)] == [[], [3], [], [1], []]


def boards(n: int, timeout_s: float) -> list[Board]:
    store = dist.HashStore()
    return [Board(store, rank, n, timeout_s) for rank in range(n)]


def test_rank_0_collects_and_all_learn():
    def rank_main(board: Board) -> object:
        return board.share("sum", sum(board.gather("number", board.rank + 1)))

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(rank_main, boards(3, 10.0))) == [6, 6, 6]


def test_missing_ranks_are_named():
    first, second, *_ = boards(5, 0.5)
    second.gather("host", "b")
    with pytest.raises(UserError, match=r"2 of 5 ranks came within 0 s; missing: ranks 2-4; look at"):
        first.gather("host", "a")


def test_ranks_text():
    assert [ranks_text([3]), ranks_text([0, 1, 2, 5]), ranks_text([1, 0])] == ["rank 3", "ranks 0-2, 5", "ranks 0-1"]
