"""Strangers at the judge's port: whatever they send, and however many they are, the ranks come in."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from megagpt.processes.watch import door as door_module
from megagpt.processes.watch.door import HELLO_S, MAX_HELLO_BYTES, MAX_STRANGERS, Door, Hello, read_hello

TOKEN = "00c0ffee"
HELLO = {"token": TOKEN, "number": 1, "host": "h", "pid": 7}


def line(**changes: object) -> bytes:
    return json.dumps(HELLO | changes).encode() + b"\n"


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def connect(listener: socket.socket) -> socket.socket:
    return socket.create_connection(listener.getsockname(), timeout=5.0)


def hung_up(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True


STRANGE = {
    "a token that is not ASCII": '{"token": "é", "number": 0}\n'.encode(),
    "half a surrogate": b'{"token": "\\ud800", "number": 0}\n',
    "a token that is a number": line(token=7),
    "no token": b'{"number": 0}\n',
    "a wrong token": line(token="00c0ffef"),
    "brackets": b"[" * MAX_HELLO_BYTES + b"\n",
    "brackets without an end": b"[" * 200_000,
    "a number without an end": b"9" * 200_000,
    "another protocol": b"GET / HTTP/1.1\r\n\r\n",
    "bytes": bytes(range(256)) * 20,
    "nothing": b"\n",
    "a rank that there is not": line(number=2),
    "a rank below zero": line(number=-1),
    "a rank that is true": line(number=True),
    "a rank that is none": line(number=[1]),
    "a field too many": line(more=1),
    "a field too few": json.dumps({"token": TOKEN, "number": 1}).encode() + b"\n",
}


@pytest.mark.parametrize("name", STRANGE)
def test_a_stranger_is_hung_up_on_and_a_rank_comes_in(name: str, listener: socket.socket):
    door = Door(listener, TOKEN, 2)
    with connect(listener) as stranger, connect(listener) as rank:
        sender = threading.Thread(target=lambda: _send(stranger, STRANGE[name]))
        sender.start()
        rank.sendall(line() + b'{"beat"')
        admitted = []
        stranger.settimeout(0.05)
        deadline_s = time.monotonic() + 30.0
        while not hung_up(stranger) or not admitted:
            assert time.monotonic() < deadline_s
            admitted += door.admit(0.0)
        ((connection, hello, rest),) = admitted
        assert (hello, rest) == (Hello(1, "h", 7), b'{"beat"')
        connection.close()


def _send(connection: socket.socket, data: bytes) -> None:
    try:
        connection.sendall(data)
    except OSError:
        return  # hung up on before its end


def test_a_thousand_that_say_nothing_keep_no_rank_out(listener: socket.socket, monkeypatch):
    monkeypatch.setattr(door_module, "MAX_STRANGERS", 20)
    door = Door(listener, TOKEN, 2)
    idle = []
    for _ in range(100):
        idle.append(connect(listener))
        assert list(door.admit(0.0)) == []
    assert sum(map(hung_up, idle[:78])) == 78, "more are open than there may be"
    with connect(listener) as rank:
        rank.sendall(line())
        ((connection, hello, _),) = door.admit(0.0)
        assert hello.number == 1
        connection.close()
    door.close()
    assert all(map(hung_up, idle[78:]))
    assert MAX_STRANGERS < 1000, "else a process may have no descriptors left for its files"


def test_who_says_nothing_or_little_is_hung_up_on_in_time(listener: socket.socket):
    door = Door(listener, TOKEN, 2)
    with connect(listener) as silent, connect(listener) as slow:
        assert list(door.admit(1.0)) == []
        slow.sendall(b"{")
        assert list(door.admit(HELLO_S)) == []
        assert list(door.admit(HELLO_S + 1.5)) == []
        assert hung_up(silent) and hung_up(slow)


def test_a_hello_is_compared_whole():
    assert read_hello(line(), TOKEN, 2) == Hello(1, "h", 7)
    assert read_hello(line(), TOKEN[:-1], 2) is None
    assert read_hello(line(token=TOKEN[:-1]), TOKEN, 2) is None
