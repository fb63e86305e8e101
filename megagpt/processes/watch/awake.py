"""A clock for those who judge the silence of others: it does not count the time for which they slept themselves."""

from __future__ import annotations

import time


class AwakeClock:
    """Seconds for which this process was awake: a gap between two readings counts as longest_gap_s at most.

    A batch system that suspends a job, SIGSTOP, or C code that holds Python's lock: whoever was not there to hear the
    others may not say that they were silent. Read it in every turn.
    """

    def __init__(self, longest_gap_s: float) -> None:
        self._longest_gap_s = longest_gap_s
        self._read_at_s, self._awake_s = time.monotonic(), 0.0

    def now_s(self) -> float:
        """Seconds since some moment."""
        now_s = time.monotonic()
        self._awake_s += min(now_s - self._read_at_s, self._longest_gap_s)
        self._read_at_s = now_s
        return self._awake_s
