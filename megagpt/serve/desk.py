"""Where clients' requests wait for the ranks, and where the pieces of their texts come back.

HTTP runs in a thread of its own; the main thread of rank 0, which the watch looks at, takes turns with the other ranks.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from megagpt.generate.request import Piece, Request
from megagpt.serve.api_error import ApiError

RETRY_AFTER_S = 1


@dataclass(frozen=True)
class Order:
    """A request by its key, which is never used again; without one: the request of that key is given up."""

    key: int
    request: Request | None = None


@dataclass(eq=False)
class Ticket:
    """What a client waits for. first_key: of its requests, which have keys in a row and n texts each."""

    first_key: int
    n_requests: int
    n: int
    pieces: asyncio.Queue[tuple[int, Piece]] = field(default_factory=asyncio.Queue)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece]]:
        """Each piece, with the number of its text: those of the first request come first. Ends with the last text."""
        n_left = self.n_requests * self.n
        while n_left:
            index, piece = await self.pieces.get()
            n_left -= piece.finish is not None
            yield index, piece


class Desk:
    """max_texts: that may be here at once, those that are being written too."""

    def __init__(self, max_texts: int) -> None:
        self.max_texts = max_texts
        self.stopping = False
        self.n_texts = 0  # of HTTP's thread, as the next three are
        self._n_keys = 0
        self._open: dict[int, tuple[Ticket, int]] = {}  # of each request under way, how many of its texts are open
        self._loop: asyncio.AbstractEventLoop | None = None
        self._orders: SimpleQueue[Order] = SimpleQueue()
        self._lock = threading.Lock()  # nothing is ordered once the desk is stopping

    # Called by HTTP's thread

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Order requests, each for as many texts.  Raises ApiError 429 where too many are here, 503 while it stops."""
        n = requests[0].sampling.n_samples
        self._loop = asyncio.get_running_loop()
        with self._lock:
            if self.stopping:
                raise ApiError(503, "the server is stopping and takes nothing new; ask another one", code="stopping")
            if self.n_texts + n * len(requests) > self.max_texts:
                message = f"{self.n_texts} texts wait or are being written, of {self.max_texts} at most; ask again"
                raise ApiError(429, message, code="queue_full", retry_after_s=RETRY_AFTER_S)
            ticket = Ticket(self._n_keys, len(requests), n)
            for request in requests:
                self._orders.put(Order(self._n_keys, request))
                self._open[self._n_keys] = ticket, n
                self._n_keys += 1
        self.n_texts += n * len(requests)
        return ticket

    def give_up(self, ticket: Ticket) -> None:
        """Its client is gone: let go what is not ended."""
        for key in range(ticket.first_key, ticket.first_key + ticket.n_requests):
            if key in self._open:
                self.n_texts -= self._open.pop(key)[1]
                self._orders.put(Order(key))

    def _hand_out(self, pieces: Sequence[tuple[int, Piece]]) -> None:
        for key, piece in pieces:
            if key not in self._open:  # given up
                continue
            ticket, n_open = self._open[key]
            ticket.pieces.put_nowait(((key - ticket.first_key) * ticket.n + piece.sample, piece))
            if piece.finish is not None:
                self.n_texts, n_open = self.n_texts - 1, n_open - 1
                self._open[key] = ticket, n_open
            if n_open == 0:
                del self._open[key]

    # Called by the main thread

    def orders(self, wait_s: float) -> list[Order]:
        """Those that are there; where there are none, wait so long for the first."""
        found: list[Order] = []
        try:
            found.append(self._orders.get(timeout=wait_s) if wait_s else self._orders.get_nowait())
            while True:
                found.append(self._orders.get_nowait())
        except Empty:
            return found

    def deliver(self, pieces: Sequence[tuple[int, Piece]]) -> None:
        """Pieces of texts, by the keys of their requests."""
        if pieces and self._loop:
            self._loop.call_soon_threadsafe(self._hand_out, pieces)

    def stop(self) -> None:
        """Take no orders from now on: those before are all among `orders`."""
        with self._lock:
            self.stopping = True
