"""Stages: the largest is as small as an exhaustive search finds."""

from __future__ import annotations

import time
from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import ModelConfig
from megagpt.config.values import Partition
from megagpt.inventory.layers import layers
from megagpt.plan.partition import balance, stage_bounds


def heaviest(weights, counts, first, last) -> int:
    ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
    groups = [sum(weights[a:b]) for a, b in pairwise(ends)]
    groups[0] += first
    groups[-1] += last
    return max(groups)


@settings(max_examples=150, deadline=None)
@given(
    weights=st.lists(st.integers(0, 20), min_size=1, max_size=9),
    pp=st.integers(1, 9),
    first=st.integers(0, 30),
    last=st.integers(0, 30),
)
def test_no_split_has_a_lighter_heaviest_stage(weights, pp, first, last):
    pp = min(pp, len(weights))
    counts = balance(weights, pp, first, last)
    assert sum(counts) == len(weights)
    assert min(counts) >= 1
    assert len(counts) == pp
    splits = (
        [b - a for a, b in pairwise([0, *cuts, len(weights)])] for cuts in combinations(range(1, len(weights)), pp - 1)
    )
    assert heaviest(weights, counts, first, last) == min(heaviest(weights, s, first, last) for s in splits)


def test_equal_blocks_are_spread_evenly():
    assert sorted(balance([1] * 7, 3)) == [2, 2, 3]
    assert sorted(balance([1] * 10, 4)) == [2, 2, 3, 3]


@pytest.mark.parametrize(
    ("partition", "bounds"),
    [
        ("uniform", (0, 5, 10)),
        ("flops", (0, 8, 10)),  # the head's V * D weighs as much as several blocks
        ("parameters", (0, 5, 10)),  # the tied matrix is on both ends
        ("7,1", (0, 8, 10)),
    ],
)
def test_what_the_methods_weigh(partition, bounds):
    model = ModelConfig(n_layers=8, d_model=512, n_heads=8, seq_len=1024, vocab_size=50257)
    assert stage_bounds(Partition.parse(partition), layers(model), pp=2) == bounds


def test_the_deepest_model_that_is_allowed_is_cut_at_once():
    """4096 unequal blocks and 64 stages, with a head that weighs as much as many: it took minutes before."""
    start_s = time.perf_counter()
    counts = balance([100 + 9 * (i % 2) for i in range(4096)], 64, 5, 100_000)
    assert time.perf_counter() - start_s < 20  # 1 s on a quiet core
    assert counts == [65] * 63 + [1]


@pytest.mark.parametrize("last", [3, 5, 9])
def test_the_other_stages_are_even_where_one_end_is_heavy(last):
    """Sum of squares, against an exhaustive search: a heavy head does not leave the others uneven."""
    counts = balance([1] * 8, 4, 0, last)
    splits = [[b - a for a, b in pairwise([0, *cuts, 8])] for cuts in combinations(range(1, 8), 3)]
    lightest = min(heaviest([1] * 8, split, 0, last) for split in splits)
    allowed = [split for split in splits if heaviest([1] * 8, split, 0, last) == lightest]
    assert sum_of_squares(counts, last) == min(sum_of_squares(split, last) for split in allowed)


def sum_of_squares(counts, last) -> int:
    return sum(count**2 for count in counts[:-1]) + (counts[-1] + last) ** 2
