"""Attended pairs in closed form, against counting each pair by the definition of its pattern."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megagpt.inventory.attended import attended_pairs

from megagpt.config.pattern import Pattern


def counted(pattern: Pattern, seq_len: int) -> int:
    return sum(len(keys(pattern, t)) for t in range(seq_len))


def keys(pattern: Pattern, t: int) -> set[int]:
    """What a query at t attends, by the words of `Pattern`."""
    earlier = set(range(t + 1))
    if pattern.kind == "dense":
        return earlier
    if pattern.kind == "window":
        return {s for s in earlier if t - s < pattern.numbers[0]}
    if pattern.kind == "strided":
        stride = pattern.numbers[0]
        return {s for s in earlier if t - s < stride or (t - s) % stride == 0}
    block, window, first, random = pattern.numbers
    own = t // block
    blocks = {b for b in range(own + 1) if own - b < window or b < first}
    others = [b for b in range(own + 1) if b not in blocks]
    blocks |= set(others[:random])  # which of them are drawn does not change how many
    return {s for s in earlier if s // block in blocks}


numbers = st.integers(1, 9)
patterns = st.one_of(
    st.just(Pattern("dense")),
    st.builds(lambda w: Pattern("window", (w,)), numbers),
    st.builds(lambda s: Pattern("strided", (s,)), numbers),
    st.builds(lambda *n: Pattern("bigbird", n), numbers, st.integers(1, 4), st.integers(0, 3), st.integers(0, 3)),
)


@settings(max_examples=400, deadline=None)
@given(patterns, st.integers(1, 60))
def test_the_closed_form_counts_each_pair(pattern, seq_len):
    assert attended_pairs(pattern, seq_len) == counted(pattern, seq_len)


@pytest.mark.parametrize(
    ("pattern", "pairs"),
    [("dense", 2048 * 2049 // 2), ("window:256", 256 * 257 // 2 + 1792 * 256), ("window:2048", 2048 * 2049 // 2)],
)
def test_by_hand(pattern, pairs):
    assert attended_pairs(Pattern.parse(pattern), 2048) == pairs
