"""JSON objects over TCP, one a line: what the watch threads of the ranks and the judge say to each other."""

from __future__ import annotations

import json
import socket
from typing import Any

MAX_LINE_BYTES = 1 << 20  # more than any message here: who sends more is not one of us
SEND_TIMEOUT_S = 2.0


class Wire:
    """One end of a connection. Only one thread may use it."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.ended = False  # nothing more will come
        self._unread = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SEND_TIMEOUT_S)

    def send(self, **message: Any) -> None:
        """Send one message; to an end that is gone, or does not read, it is lost: `ended` and silence tell."""
        try:
            self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # who depends on the answer watches for `ended` and for silence

    def receive(self) -> list[dict[str, Any]]:
        """The messages that are there. Call it when the socket is readable; it sets `ended` at the end."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        lines = (self._unread + data).split(b"\n")
        self._unread = lines.pop()
        self.ended = not data or len(self._unread) > MAX_LINE_BYTES
        messages: list[dict[str, Any]] = []
        for line in lines:
            try:
                messages.append(dict(json.loads(line)))
            except (ValueError, TypeError):  # a stranger
                self.ended = True
                break
        return messages

    def close(self) -> None:
        """Hang up."""
        self.socket.close()
