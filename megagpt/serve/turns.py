"""The loop over all ranks of a server: in each turn rank 0 says what is new, and every engine goes one step.

Replicas share out the requests; each goes a step in each turn, so that one message says all, and their pieces come back
to rank 0 in it. One process sends nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from megagpt.generate.engine import Engine
from megagpt.generate.request import Piece, Request
from megagpt.parallel.mesh import Mesh
from megagpt.processes.watch.watch import Watch
from megagpt.serve.desk import Desk

T = TypeVar("T")
IDLE_S = 0.5  # between two turns with nothing to do: the other ranks hear from rank 0, and rank 0 sees a signal


@dataclass(frozen=True)
class Given:
    """A request by its key, and the replica that is to answer it."""

    key: int
    replica: int
    request: Request


@dataclass(frozen=True)
class News:
    """What all ranks do in a turn.  given_up: keys.  ends: this turn is the last one."""

    given: tuple[Given, ...] = ()
    given_up: tuple[int, ...] = ()
    ends: bool = False


@dataclass
class UnderWay:
    """A request at a replica, of which so many texts are open."""

    replica: int
    n_open: int


class Clerk:
    """On rank 0, between the desk and the replicas: who answers what.

    asked_to_stop: whether the server is to end, once all that it has taken is answered.
    """

    def __init__(self, desk: Desk, n_replicas: int, asked_to_stop: Callable[[], bool]) -> None:
        self.desk, self.asked_to_stop = desk, asked_to_stop
        self.loads = [0] * n_replicas  # texts under way
        self._under_way: dict[int, UnderWay] = {}

    def news(self) -> News:
        """What to do next; where nothing is under way, after IDLE_S at the latest."""
        if self.asked_to_stop():
            self.desk.stop()
        given: list[Given] = []
        given_up: list[int] = []
        for order in self.desk.orders(0 if self._under_way or self.desk.stopping else IDLE_S):
            if order.request is not None:
                given.append(self._give(order.key, order.request))
            elif order.key in self._under_way:
                self._drop(order.key)
                given_up.append(order.key)
        return News(tuple(given), tuple(given_up), ends=self.desk.stopping and not self._under_way)

    def deliver(self, pieces: list[tuple[int, Piece]]) -> None:
        """Hand on what the replicas have written."""
        for key, piece in pieces:
            if piece.finish is None or key not in self._under_way:
                continue
            found = self._under_way[key]
            found.n_open -= 1
            self.loads[found.replica] -= 1
            if found.n_open == 0:
                del self._under_way[key]
        self.desk.deliver(pieces)

    def _give(self, key: int, request: Request) -> Given:
        replica = self.loads.index(min(self.loads))
        n = request.sampling.n_samples
        self._under_way[key] = UnderWay(replica, n)
        self.loads[replica] += n
        return Given(key, replica, request)

    def _drop(self, key: int) -> None:
        found = self._under_way.pop(key)
        self.loads[found.replica] -= found.n_open


class Worker:
    """On each rank: its engine, with requests known by their keys."""

    def __init__(self, engine: Engine, replica: int) -> None:
        self.engine, self.replica = engine, replica
        self._keys: dict[int, int] = {}  # by the engine's number
        self._n_open: dict[int, int] = {}  # texts, by that number

    def turn(self, news: News) -> list[tuple[int, Piece]]:
        """Take up what is new, and go one step.  Comm: that of a step, over the ranks of a replica."""
        for given in news.given:
            if given.replica == self.replica:
                number = self.engine.add(given.request)
                self._keys[number], self._n_open[number] = given.key, given.request.sampling.n_samples
        for number in [number for number, key in self._keys.items() if key in news.given_up]:
            self.engine.cancel(number)
            self._forget(number)
        pieces = [] if self.engine.idle else self.engine.step()
        found = [(self._keys[piece.request], piece) for piece in pieces if piece.request in self._keys]
        for piece in pieces:
            if piece.finish is not None and piece.request in self._keys:
                self._n_open[piece.request] -= 1
                if self._n_open[piece.request] == 0:
                    self._forget(piece.request)
        return found

    def _forget(self, number: int) -> None:
        del self._keys[number], self._n_open[number]


class Meeting:
    """Messages between rank 0 and the others, by gloo: who waits for one does not keep a core busy."""

    def __init__(self, mesh: Mesh) -> None:
        """Comm: collective, where there are several processes."""
        self.mesh = mesh
        if mesh.world_size > 1:
            self.all: Any = dist.new_group(backend="gloo")
            self.fronts: Any = dist.new_group([d * mesh.model.size for d in range(mesh.data.size)], backend="gloo")

    def from_rank_0(self, value: T | None) -> T:
        """What rank 0 holds, on all.  Comm: a broadcast of an object."""
        box = [value]
        if self.mesh.world_size > 1:
            dist.broadcast_object_list(box, group=self.all, group_src=0)
        assert box[0] is not None
        return box[0]

    def to_rank_0(self, pieces: list[T]) -> list[T]:
        """On rank 0, those of all replicas.  Comm: with replicas, a gather of objects from the first rank of each."""
        mesh = self.mesh
        if mesh.data.size == 1 or mesh.pipe.rank or mesh.model.rank:
            return pieces
        parts: list[list[T]] | None = [[]] * mesh.data.size if mesh.rank == 0 else None
        dist.gather_object(pieces, parts, group=self.fronts, group_dst=0)
        return [piece for part in parts or [] for piece in part]


def take_turns(worker: Worker, meeting: Meeting, watch: Watch, clerk: Clerk | None) -> None:
    """Until the clerk, whom rank 0 has, says that it is over.  Comm: of each turn, as said above."""
    for number in itertools.count(1):
        news = clerk.news() if clerk else None
        with watch.step(number):
            news = meeting.from_rank_0(news)
            pieces = meeting.to_rank_0(worker.turn(news))
        if clerk:
            clerk.deliver(pieces)
        if news.ends:
            return
