"""When a rank is lost or slow, and the paces of the watch."""

from __future__ import annotations

from dataclasses import dataclass

from megagpt.processes.watch.awake import AwakeClock

BEAT_S = 1.0  # between two signs of life of a rank and its host
TURN_S = 0.1  # between two looks at the clock
START_S = 30.0  # how long a process of the watch may take, on a busy machine, before it is heard for the first time
HANG_UP_S = 2.0  # how long those who were told to end may take


@dataclass(frozen=True)
class Limits:
    """When a rank is lost or slow.

    heartbeat_timeout_s: without a sign of life. progress_timeout_s: without a move of any thread that waits.
    slow_rank_factor: times the work of its peers in a step; 0: never. window_s: over which that is compared.
    Times are those of `clock`.
    """

    heartbeat_timeout_s: float = 60.0
    progress_timeout_s: float = 600.0
    slow_rank_factor: float = 1.5
    window_s: float = 10.0  # 200 looks at each rank

    @property
    def host_beat_s(self) -> float:
        """Between two signs of life of a host and the judge, which hears hundreds of them."""
        return min(2 * BEAT_S, self.heartbeat_timeout_s / 3)

    def clock(self) -> AwakeClock:
        """A clock by which a job that was paused as a whole has lost nobody."""
        return AwakeClock(self.heartbeat_timeout_s / 4)
