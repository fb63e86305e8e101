"""Which keys each pattern lets a query attend, and how many, against the published definitions written out as loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megagpt.config.pattern import Pattern
from megagpt.model.attention.masks import Masks
from megagpt.model.attention.patterns import random_blocks
from tests.tolerances import assert_equal

CPU = torch.device("cpu")
SEQ_LEN = 67
BIGBIRD = "bigbird:5:2:1:3"


def attended(pattern: Pattern, t: int) -> set[int]:
    """What a query at t attends. Beltagy et al. 2020, section 3.1; Child et al. 2019, section 4.3; Zaheer et al. 2020.

    Of BigBird's random blocks the first ones: which of them are drawn does not change how many.
    """
    earlier = range(t + 1)
    if pattern.kind == "dense":
        return set(earlier)
    if pattern.kind == "window":
        return {s for s in earlier if s > t - pattern.numbers[0]}
    if pattern.kind == "strided":  # A(1): the last l; A(2): (i - j) mod l = 0
        (stride,) = pattern.numbers
        return set(range(max(0, t - stride + 1), t + 1)) | {s for s in earlier if (t - s) % stride == 0}
    block, window, first, random = pattern.numbers
    own = t // block
    blocks = {b for b in range(own + 1) if own - b < window or b < first}
    blocks |= set([b for b in range(own + 1) if b not in blocks][:random])
    return {s for s in earlier if s // block in blocks}


def by_loops(text: str, T: int) -> Tensor:
    """The mask of a pattern without random blocks."""
    allowed = torch.zeros(T, T, dtype=torch.bool)
    for t in range(T):
        allowed[t, list(attended(Pattern.parse(text), t))] = True
    return allowed


numbers = st.integers(1, 9)
patterns = st.one_of(
    st.just(Pattern("dense")),
    st.builds(lambda w: Pattern("window", (w,)), numbers),
    st.builds(lambda s: Pattern("strided", (s,)), numbers),
    st.builds(lambda *n: Pattern("bigbird", n), numbers, st.integers(1, 4), st.integers(0, 3), st.integers(0, 3)),
)


@settings(max_examples=400, deadline=None)
@given(patterns, st.integers(1, 60))
def test_pairs_are_counted_in_closed_form(pattern, seq_len):
    assert pattern.rule.attended_pairs(seq_len) == sum(len(attended(pattern, t)) for t in range(seq_len))


@pytest.mark.parametrize(
    ("text", "pairs"),
    [("dense", 2048 * 2049 // 2), ("window:256", 256 * 257 // 2 + 1792 * 256), ("window:2048", 2048 * 2049 // 2)],
)
def test_pairs_by_hand(text, pairs):
    assert Pattern.parse(text).rule.attended_pairs(2048) == pairs


@pytest.mark.parametrize("T", [1, 8, 9, SEQ_LEN])
@pytest.mark.parametrize("text", ["dense", "window:1", "window:8", "window:67", "strided:1", "strided:7"])
def test_dense_masks_are_the_published_ones(text, T):
    assert_equal(Masks(Pattern.parse(text), 0, SEQ_LEN).dense(T, CPU)[0, 0], by_loops(text, T))


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("text", [BIGBIRD, "bigbird:4:1:0:2", "bigbird:8:3:2:0"])
def test_bigbird_sees_last_first_and_random_blocks(text, layer):
    """Zaheer et al. 2020, section 2, and never ahead: of each block of queries exactly that many blocks of keys."""
    size, n_last, n_first, n_random = map(int, text.split(":")[1:])
    allowed_TT = Masks(Pattern.parse(text), layer, SEQ_LEN).dense(SEQ_LEN, CPU)[0, 0]
    assert not allowed_TT.triu(1).any()
    for t in range(SEQ_LEN):
        own = t // size
        seen = {s // size for s in range(t + 1) if allowed_TT[t, s]}
        always = set(range(max(0, own - n_last + 1), own + 1)) | set(range(min(n_first, own + 1)))
        assert always <= seen
        between = max(0, own - n_last + 1 - n_first)
        assert len(seen - always) == min(n_random, between)
        for block in seen:  # whole blocks, but for what is ahead
            assert allowed_TT[t, block * size : min((block + 1) * size, t + 1)].all()
        assert_equal(allowed_TT[t, : own * size], allowed_TT[own * size, : own * size], "of one block of queries")


def test_random_blocks_follow_from_layer_and_block_alone():
    base = random_blocks(2, 30, 2, 1, 3)
    torch.manual_seed(9)
    assert_equal(random_blocks(2, 30, 2, 1, 3), base)
    assert_equal(random_blocks(2, 50, 2, 1, 3)[:30, :30], base, "a longer context")
    assert (random_blocks(3, 30, 2, 1, 3) != base).any()
    drawn = torch.stack([random_blocks(layer, 30, 2, 1, 3)[29] for layer in range(100)]).sum(0)
    assert drawn[1:28].min() > 0, "each block between the first and the last ones is drawn by some layer"
    assert drawn[0] == 0 and drawn[28:].sum() == 0


@pytest.mark.parametrize("text", ["dense", "window:9", "strided:7", BIGBIRD])
def test_a_shorter_sequence_sees_a_part_of_the_mask(text):
    masks = Masks(Pattern.parse(text), 1, SEQ_LEN)
    whole = masks.dense(SEQ_LEN, CPU)
    for T in (1, 20, 66):
        assert_equal(masks.dense(T, CPU), whole[..., :T, :T])


@pytest.mark.parametrize("text", ["dense", "window:9", "strided:7", BIGBIRD])
def test_flex_attentions_mask_is_the_dense_one(text):
    masks = Masks(Pattern.parse(text), 1, SEQ_LEN)
    blocks = masks.blocks(SEQ_LEN, CPU)
    positions_T = torch.arange(SEQ_LEN)
    at = torch.stack(torch.meshgrid(positions_T, positions_T, indexing="ij"), -1).flatten(0, 1)
    mod = blocks.mask_mod(torch.tensor(0), torch.tensor(0), at[:, 0], at[:, 1])
    assert_equal(mod.view(SEQ_LEN, SEQ_LEN), masks.dense(SEQ_LEN, CPU)[0, 0])


def test_flex_attention_skips_the_blocks_that_nobody_attends():
    """At 128 positions a block: a window of 128 touches two blocks a row, all of them two of which are partial."""
    blocks = Masks(Pattern.parse("window:128"), 0, 1024).blocks(1024, CPU)
    assert blocks.to_dense()[0, 0].sum(-1).tolist() == [1] + 7 * [2]


@pytest.mark.parametrize("text", ["dense", "window:9", "strided:7", BIGBIRD])
def test_queries_and_keys_anywhere_have_their_entries_of_the_mask(text):
    masks = Masks(Pattern.parse(text), 1, SEQ_LEN)
    queries_BT, keys_BS = torch.randint(SEQ_LEN, (2, 5)), torch.randint(SEQ_LEN, (2, 40))
    expected = masks.dense(SEQ_LEN, CPU)[0, 0][queries_BT.unsqueeze(2), keys_BS.unsqueeze(1)]
    assert_equal(masks.between(queries_BT, keys_BS), expected)


def test_masks_are_made_once_for_a_length():
    masks = Masks(Pattern.parse("strided:7"), 0, SEQ_LEN)
    assert masks.dense(20, CPU) is masks.dense(20, CPU)
    assert masks.blocks(20, CPU) is masks.blocks(20, CPU)
    assert [masks.dense(n, CPU).shape[-1] for n in (30, 20)] == [30, 20]
