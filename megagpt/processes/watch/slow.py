"""Who is slow: a rank's time in a step is work and waiting in collectives.

A slow rank makes all slow, but it alone waits little. No sockets, no threads, no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

N_WINDOWS = 3  # in a row, before a rank is named
MIN_STEPS = 2  # in a window
MIN_SHARE = 0.1  # of a step that must be lost: a rank may well be busy for 3 ms while its peers are for 1


@dataclass(frozen=True)
class Work:
    """Totals since the start, in steps: of every rank's."""

    steps_done: int
    busy_s: float
    waiting_s: float


@dataclass(frozen=True)
class Slow:
    """A rank that is slow: its work in a step, the whole step, and the work of its peers (the median)."""

    rank: int
    busy_s: float
    step_s: float
    peers_s: float

    def __str__(self) -> str:
        return (
            f"busy for {1e3 * self.busy_s:.0f} ms of a step of {1e3 * self.step_s:.0f} ms, "
            f"its peers for {1e3 * self.peers_s:.0f} ms"
        )


class SlowRanks:
    """Compares ranks window by window."""

    def __init__(self, groups: Sequence[Sequence[int]], factor: float, window_s: float) -> None:
        """groups: the ranks that have the same to do (a pipeline stage). factor: how much longer is slow; 0: never."""
        self.factor, self.window_s = factor, window_s
        self.groups = [group for group in groups if len(group) > 1] if factor else []
        self._began_s = 0.0
        self._before: Mapping[int, Work] = {}
        self._n_slow = dict.fromkeys((rank for group in self.groups for rank in group), 0)

    def is_due(self, now_s: float) -> bool:
        """Whether `update` has something to compare by now."""
        return bool(self._n_slow) and not (self._before and now_s - self._began_s < self.window_s)

    def stop(self) -> None:
        """Compare nobody any more."""
        self._n_slow = {}

    def update(self, now_s: float, work: Mapping[int, Work]) -> list[Slow]:
        """Who has become slow, given the work of ranks until now; usually nobody."""
        found: list[Slow] = []
        if not self.is_due(now_s) or not self._n_slow.keys() <= work.keys():
            return found
        if self._before:
            if min(work[rank].steps_done - self._before[rank].steps_done for rank in self._n_slow) < MIN_STEPS:
                return found
            found = [slow for group in self.groups for slow in self._compare(group, work)]
        self._began_s, self._before = now_s, dict(work)
        return found

    def _compare(self, group: Sequence[int], work: Mapping[int, Work]) -> Iterator[Slow]:
        spent = {rank: _per_step(work[rank], self._before[rank]) for rank in group}
        peers = sorted((busy_s, rank) for rank, (busy_s, _) in spent.items())
        for place, (busy_s, rank) in enumerate(peers):
            step_s, peers_s = spent[rank][1], _median_without(place, peers)
            slow = busy_s > self.factor * peers_s and busy_s - peers_s > MIN_SHARE * step_s
            self._n_slow[rank] = self._n_slow[rank] + 1 if slow else 0
            if self._n_slow[rank] == N_WINDOWS:  # once, until it has been fast again
                yield Slow(rank, busy_s, step_s, peers_s)


def _median_without(place: int, values: Sequence[tuple[float, int]]) -> float:
    """The median of sorted values but for the one at that place."""

    def value(i: int) -> float:
        return values[i + (i >= place)][0]

    n = len(values) - 1
    return (value((n - 1) // 2) + value(n // 2)) / 2


def _per_step(now: Work, before: Work) -> tuple[float, float]:
    """Seconds of work and seconds in all, per step of the window."""
    n_steps = now.steps_done - before.steps_done
    busy_s = (now.busy_s - before.busy_s) / n_steps
    return busy_s, busy_s + (now.waiting_s - before.waiting_s) / n_steps
