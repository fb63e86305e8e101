"""The clock of those who judge the silence of others."""

from __future__ import annotations

from megagpt.processes.watch.awake import AwakeClock


def test_its_own_sleep_counts_little(monkeypatch):
    times = iter([100.0, 100.5, 101.0, 5000.0, 5000.5])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    clock = AwakeClock(longest_gap_s=15.0)
    assert [clock.now_s() for _ in range(4)] == [0.5, 1.0, 16.0, 16.5]
