"""The door of a port of the watch: ranks and hosts come in by their token, and strangers can do nothing there.

Anybody who reaches the port may connect, send anything, or nothing. So until a token has been seen, size, depth, time
and number are bounded, and nothing that comes is an error. When all are in, the port is closed.
"""

from __future__ import annotations

import hmac
import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass

MAX_HELLO_BYTES = 4096  # of a first line: number, host and process
MAX_STRANGERS = 128  # connections beside those of the n that may be open without having said who they are
HELLO_S = 10.0  # how long they may be silent; who belongs here speaks at once


@dataclass(frozen=True)
class Hello:
    """What a rank says of itself first, or a host. number: of a rank on its host; of a host in the run."""

    number: int
    host: str
    pid: int


class Door:
    """Owns the listening socket and the connections that have not said who they are."""

    def __init__(self, listener: socket.socket, token: str, n: int) -> None:
        listener.setblocking(False)
        self._listener, self._token, self._n = listener, token, n
        self._waiting: dict[socket.socket, tuple[bytes, float]] = {}  # said so far, and since when; the oldest first

    def admit(self, now_s: float) -> Iterator[tuple[socket.socket, Hello, bytes]]:
        """Those that have come since the last call, each with what it sent after its hello. Does not wait."""
        self._accept(now_s)
        for connection, (said, since_s) in list(self._waiting.items()):
            try:
                said += (came := connection.recv(MAX_HELLO_BYTES))
            except BlockingIOError:
                if now_s - since_s > HELLO_S:
                    self._hang_up(connection)
                continue
            except OSError:
                came = b""
            line, ends, rest = said.partition(b"\n")
            hello = read_hello(line, self._token, self._n) if ends and len(line) <= MAX_HELLO_BYTES else None
            if hello:
                del self._waiting[connection]
                yield connection, hello, rest
            elif not came or ends or len(said) > MAX_HELLO_BYTES:
                self._hang_up(connection)
            else:
                self._waiting[connection] = said, since_s

    def close(self) -> None:
        """Nobody else comes in."""
        self._listener.close()
        for connection in list(self._waiting):
            self._hang_up(connection)

    def _accept(self, now_s: float) -> None:
        for _ in range(MAX_STRANGERS):
            try:
                connection, _ = self._listener.accept()
            except OSError:  # nobody waits; or somebody has gone again; or there is no descriptor left for him
                return
            connection.setblocking(False)
            self._waiting[connection] = b"", now_s
            if len(self._waiting) > self._n + MAX_STRANGERS:
                self._hang_up(next(iter(self._waiting)))

    def _hang_up(self, connection: socket.socket) -> None:
        del self._waiting[connection]
        connection.close()


def read_hello(line: bytes, token: str, n: int) -> Hello | None:
    """The first line of a connection, MAX_HELLO_BYTES at most; None unless one of the n of this run has written it."""
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(said, dict) or not isinstance(said.get("token"), str):
        return None
    if not hmac.compare_digest(said.pop("token").encode(errors="surrogatepass"), token.encode()):
        return None
    try:
        hello = Hello(**said)
    except TypeError:
        return None
    typed = type(hello.number) is type(hello.pid) is int and type(hello.host) is str
    return hello if typed and 0 <= hello.number < n else None
