"""Stages: the largest is as small as an exhaustive search finds."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.config import ModelConfig
from megagpt.plan.partition import balance, stage_bounds
from megagpt.plan.sizes import layer_sizes


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
    assert stage_bounds(partition, layer_sizes(model, tp=1), pp=2) == bounds
