"""Finding a slow rank: one that works for much longer in its steps than those who have the same to do.

A rank's time in a step is work and waiting in collectives. A slow rank makes all slow, but it alone waits little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

WINDOW_S = 10.0  # compared at once: 200 looks at each rank
N_WINDOWS = 3  # in a row, before a rank is named
MIN_STEPS = 2  # in a window
MIN_SHARE = 0.1  # of a step that must be lost: a rank may well be busy for 3 ms while its peers are for 1


@dataclass(frozen=True)
class Work:
    """Totals since the start, in steps: of every rank's."""

    steps_done: int
    busy_s: float
    waiting_s: float


class SlowRanks:
    """Compares ranks window by window."""

    def __init__(self, names: Sequence[str], groups: Sequence[Sequence[int]], factor: float, window_s: float) -> None:
        """groups: the ranks that have the same to do (a pipeline stage). factor: how much longer is slow; 0: never."""
        self.names, self.factor, self.window_s = names, factor, window_s
        self.groups = [group for group in groups if len(group) > 1] if factor else []
        self._began_s = 0.0
        self._before: Mapping[int, Work] = {}
        self._n_slow = [0] * len(names)

    def update(self, now_s: float, work: Mapping[int, Work]) -> list[str]:
        """What to tell the user, given every rank's work until now; usually nothing."""
        if not self.groups or len(work) < len(self.names):
            return []
        found: list[str] = []
        if self._before:
            fewest = min(work[rank].steps_done - self._before[rank].steps_done for rank in work)
            if now_s - self._began_s < self.window_s or fewest < MIN_STEPS:
                return []
            found = [text for group in self.groups for text in self._compare(group, work)]
        self._began_s, self._before = now_s, dict(work)
        return found

    def _compare(self, group: Sequence[int], work: Mapping[int, Work]) -> list[str]:
        spent = {rank: _per_step(work[rank], self._before[rank]) for rank in group}
        found = []
        for rank in group:
            busy_s, step_s = spent[rank]
            peers_s = median(spent[other][0] for other in group if other != rank)
            slow = busy_s > self.factor * peers_s and busy_s - peers_s > MIN_SHARE * step_s
            self._n_slow[rank] = self._n_slow[rank] + 1 if slow else 0
            if self._n_slow[rank] == N_WINDOWS:  # once, until it has been fast again
                found.append(
                    f"{self.names[rank]} is slow: busy for {1e3 * busy_s:.0f} ms of a step of {1e3 * step_s:.0f} ms, "
                    f"its peers for {1e3 * peers_s:.0f} ms"
                )
        return found


def _per_step(now: Work, before: Work) -> tuple[float, float]:
    """Seconds of work and seconds in all, per step of the window."""
    n_steps = now.steps_done - before.steps_done
    busy_s = (now.busy_s - before.busy_s) / n_steps
    return busy_s, busy_s + (now.waiting_s - before.waiting_s) / n_steps
