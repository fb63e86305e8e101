"""The watch over many ranks: who is named, how much is said, how long it takes; make scale-check does it with 4,096."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from megagpt.processes.watch.slow import N_WINDOWS, SlowRanks, Work
from megagpt.processes.watch.verdict import RankView, culprits, describe, needs
from tests.processes.watch.fakes import LIMITS, FakeRun

FAULTS = {
    "hang": "rank 67 (pipe 0, data 16, model 3) on node-016 hangs in step ",
    "death": "rank 67 (pipe 0, data 16, model 3) on node-016 died (process 10067, last seen in step ",
    "host death": "the watch on node-016 died (process ",
    "host stop": (
        "rank 64 (pipe 0, data 16, model 0), rank 65 (pipe 0, data 16, model 1), rank 66 (pipe 0, data 16, model 2) "
        "and rank 67 (pipe 0, data 16, model 3) on node-016 was stopped by a signal (process 10064, last seen in step "
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_of_many_ranks_the_bad_ones_are_named_alone(fault: str, tmp_path: Path):
    with FakeRun(n_hosts=32, n_local=4, folder=tmp_path) as run:
        run.open()
        assert run.received_bytes < 32 * 4096, "what each host is told at the start grows with the run"
        assert run.n_connections() <= 32
        run.go_on(1.5)  # a beat of each host
        run.fail(fault)
        _, message = run.message()
        assert message.startswith(f"error: {FAULTS[fault]}"), message
        assert run.wrongly_named(message) == 0
        assert run.longest_pause_s < LIMITS.heartbeat_timeout_s
        assert message.count("error: ") == 1


def stuck(n_hosts: int, n_local: int, bad: int, silent: int = 0) -> list[RankView]:
    """Ranks of which one does not come to its model axis's collective; of so many others no answer came."""
    views = []
    for rank in range(n_hosts * n_local):
        near = rank // n_local == bad // n_local
        first = rank - rank % n_local
        members = range(first, first + n_local) if near else range(rank % n_local, n_hosts * n_local, n_local)
        wanted = None if bad < rank <= bad + silent else needs(rank, "all_reduce", members)
        views.append(RankView(rank, f"rank {rank}", collective="all_reduce", waits_for=wanted, place="a.py:1 f"))
    views[bad].collective, views[bad].waits_for = None, ()
    return views


def test_blame_takes_a_time_that_grows_with_the_ranks_and_not_with_their_cube():
    """Seconds of 4,096 ranks were a minute of 1,024 before."""
    began_s = time.process_time()
    text = describe(stuck(512, 8, bad=27), 600.0)
    assert text.startswith("rank 27 on an unknown host hangs ")
    assert time.process_time() - began_s < 10.0


def test_a_world_wide_collective_is_one_range():
    views = [
        RankView(r, f"rank {r}", collective="barrier", waits_for=needs(r, "barrier", range(4096))) for r in range(4096)
    ]
    assert views[0].waits_for == (range(0, 4096),)
    views[9] = RankView(9, "rank 9")
    assert [view.rank for view in culprits(views)] == [9]


def test_who_has_not_answered_is_not_blamed_where_another_is():
    assert [view.rank for view in culprits(stuck(32, 4, bad=67, silent=30))] == [67]


def test_slow_ranks_of_a_large_stage_are_found():
    slow = SlowRanks([range(4096)], 1.5, 10.0)
    found = []
    for window in range(N_WINDOWS + 1):
        work = {r: Work(10 * window, window * (0.8 if r == 70 else 0.4), window * 0.6) for r in range(4096)}
        found += [s.rank for s in slow.update(10.0 * window, work)]
    assert found == [70]


def test_needs_are_few_ranges_whatever_the_ranks():
    assert needs(3, "all_reduce", [1, 2]) == (range(1, 4),)
    assert needs(8, "all_reduce", [0, 16, 24]) == (range(0, 25, 8),)
    assert needs(0, "recv", [5]) == (range(5, 6),)
    spans = needs(4, "all_reduce", [0, 1, 2, 7, 9])
    assert sorted(rank for span in spans for rank in span) == [0, 1, 2, 4, 7, 9]
