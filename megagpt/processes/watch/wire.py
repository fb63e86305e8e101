"""Connections of the watch: JSON, a line a message, between a rank and its host, a host and the judge."""

from __future__ import annotations

import json
import selectors
import socket
from collections.abc import Iterable, Iterator
from typing import Any

from megagpt.processes.watch.door import Door

MAX_LINE_BYTES = 1 << 20  # more than any message here: what is longer is none of ours
SEND_TIMEOUT_S = 2.0


class Wire:
    """One end of a connection. Only one thread may use it."""

    def __init__(self, connection: socket.socket, unread: bytes = b"") -> None:
        """unread: what has been taken from the connection already."""
        self.socket = connection
        self.ended = False  # nothing more will come
        self._unread = unread
        if connection.family != socket.AF_UNIX:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(SEND_TIMEOUT_S)

    def send(self, **message: Any) -> None:
        """Send one message; to an end that is gone, or does not read, it is lost: `ended` and silence tell."""
        self.send_line(line_of(message))

    def send_line(self, line: bytes) -> None:
        """Send what `line_of` gave."""
        try:
            self.socket.sendall(line)
        except OSError:
            return  # who depends on the answer watches for `ended` and for silence

    def receive(self) -> list[dict[str, Any]]:
        """The messages that are there. Call it when the socket is readable; it sets `ended` at the end."""
        try:
            data = self.socket.recv(1 << 16)
        except OSError:
            data = b""
        messages = self.read(data)
        self.ended = self.ended or not data
        return messages

    def read(self, data: bytes = b"") -> list[dict[str, Any]]:
        """The messages in what has been taken from the connection already, and in this."""
        lines = (self._unread + data).split(b"\n")
        self._unread = lines.pop()
        self.ended = len(self._unread) > MAX_LINE_BYTES
        messages: list[dict[str, Any]] = []
        for line in lines:
            try:
                messages.append(dict(json.loads(str(line, "utf-8"))))
            except (ValueError, TypeError, RecursionError):  # not one of ours
                self.ended = True
                break
        return messages

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


def line_of(message: dict[str, Any]) -> bytes:
    """A message as it goes over a wire."""
    return json.dumps(message).encode() + b"\n"


class Circle:
    """Those who come in by one door, each with a number and a wire: the ranks of a host, the hosts of a run."""

    def __init__(self, listener: socket.socket, token: str, numbers: Iterable[int]) -> None:
        """numbers: of those who are expected; when all have come, the door is closed."""
        self._expected = set(numbers)
        self._door: Door | None = Door(listener, token, max(self._expected) + 1)
        self._selector = selectors.DefaultSelector()
        self._wires: dict[int, Wire] = {}

    @property
    def complete(self) -> bool:
        """Whether all have come."""
        return self._door is None

    @property
    def empty(self) -> bool:
        """Whether none is there: all have gone again, or none has come."""
        return not self._wires

    def __contains__(self, number: int) -> bool:
        """Whether that one is there."""
        return number in self._wires

    def add(self, number: int, wire: Wire) -> None:
        """Somebody to be heard and told as well who has not come by the door."""
        self._wires[number] = wire
        self._selector.register(wire.socket, selectors.EVENT_READ, number)

    def hear(self, patience_s: float, now_s: float) -> Iterator[tuple[int, dict[str, Any]]]:
        """Messages that are there or come within that time, with the number of who sends them.

        The first of each is {"hello": Hello}, the last {"gone": True}.
        """
        if self._door:
            for connection, hello, rest in self._door.admit(now_s):
                if hello.number in self._expected:
                    self._expected.remove(hello.number)
                    self.add(hello.number, wire := Wire(connection, rest))
                    for message in ({"hello": hello}, *wire.read()):
                        yield hello.number, message
                else:  # a second one of its number is none
                    connection.close()
            if not self._expected:
                self._door.close()
                self._door = None
        for key, _ in self._selector.select(patience_s):
            wire = self._wires[key.data]
            for message in wire.receive():
                yield key.data, message
            if wire.ended:
                self._selector.unregister(wire.socket)
                wire.close()
                del self._wires[key.data]
                yield key.data, {"gone": True}

    def tell(self, numbers: Iterable[int], **message: Any) -> None:
        """Send a message to those of them who are there."""
        line = line_of(message)
        for number in numbers:
            if wire := self._wires.get(number):
                wire.send_line(line)

    def close(self) -> None:
        """Hang up on all."""
        for wire in self._wires.values():
            wire.close()
        if self._door:
            self._door.close()
        self._selector.close()
