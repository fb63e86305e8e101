"""Where the store listens. On Linux all of 127.0.0.0/8 is this machine: 127.0.0.2 stands for another interface."""

from __future__ import annotations

import socket
from datetime import timedelta

import pytest
import torch.distributed as dist

from megagpt.errors import EXIT_PEER_LOST
from megagpt.processes.agree import RankError
from megagpt.processes.rendezvous import open_store


def answers(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=5.0).close()
    except ConnectionRefusedError:
        return False
    return True


@pytest.fixture
def port(monkeypatch) -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return port


def test_the_store_listens_on_its_address_alone(port):
    store = open_store(0, 10.0)
    store.set("a", "b")
    assert answers("127.0.0.1", port) and not answers("127.0.0.2", port)
    assert open_store(1, 10.0).get("a") == b"b"
    again = open_store(0, 10.0)  # the same one: a program may open it twice
    assert again.get("a") == b"b"


def test_torchs_own_store_would_listen_on_all(port):
    """Else the test above could not fail."""
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=10))
    assert store.port == port and answers("127.0.0.2", port)


def test_a_taken_port_is_told(port):
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(RankError, match=rf"cannot open 127.0.0.1:{port} .*use"),
    ):
        open_store(0, 2.0)


def test_a_store_that_is_not_there_is_told(port):
    with pytest.raises(RankError, match=rf"no answer from rank 0 at 127.0.0.1:{port} .* within 1 s") as caught:
        open_store(1, 1.0)
    assert caught.value.code == EXIT_PEER_LOST


@pytest.mark.parametrize("rank", [1, 2])
def test_who_listens_and_gives_no_answer_is_told(port, rank, monkeypatch):
    """Another program; or a store that thousands of strangers keep busy. torch would wait without end."""
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    with (
        socket.create_server(("127.0.0.1", port)),
        pytest.raises(
            RankError, match=rf"127.0.0.1:{port} .* takes connections, and gave no answer as a store"
        ) as told,
    ):
        open_store(rank, 0.5)
    assert told.value.code == EXIT_PEER_LOST and told.value.speaks == (rank == 1)
