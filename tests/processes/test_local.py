"""Ranks from the fork server: what they return, and how each way to fail is told."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from megagpt.processes.local import run_ranks
from tests.tolerances import assert_equal


def describe(*args):
    return dist.get_rank(), dist.get_world_size(), torch.get_num_threads(), os.environ["LOCAL_RANK"], args


def add_up(x):
    x = x + dist.get_rank()
    dist.all_reduce(x)
    return x


def fail_on(rank):
    if dist.get_rank() == rank:
        raise KeyError("this one")
    time.sleep(60)


def die_on(rank):
    if dist.get_rank() == rank:
        os._exit(7)
    time.sleep(60)


@pytest.mark.parametrize("n_ranks", [1, 3])
def test_answers_come_in_the_order_of_ranks(n_ranks):
    expected = [(rank, n_ranks, 1, str(rank), ("a", 2)) for rank in range(n_ranks)]
    assert run_ranks(describe, n_ranks, "a", 2) == expected


def test_threads_of_a_rank_can_be_set():
    assert run_ranks(describe, 1, n_threads=2)[0][2] == 2


def test_tensors_go_there_and_back():
    x = torch.randn(1000, 7)
    expected = x + (x + 1)
    for y in run_ranks(add_up, 2, x):
        assert_equal(y, expected)


def test_a_failing_rank_ends_all_with_its_traceback():
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 failed:\nTraceback.*in fail_on.*KeyError: 'this one'"):
        run_ranks(fail_on, 2, 1)
    assert time.monotonic() - start < 30


def test_a_dead_rank_ends_all():
    with pytest.raises(RuntimeError, match="rank 0 died with exit code 7"):
        run_ranks(die_on, 2, 0)


def test_silence_is_a_timeout():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] gave no answer within 2 s"):
        run_ranks(time.sleep, 2, 60, timeout_s=2.0)
