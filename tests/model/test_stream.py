"""Tokens at positions of their own, and decoding with a cache: the logits of the whole sequence, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megagpt.config import ModelConfig
from megagpt.model.gpt import GPT
from megagpt.model.position import POSITIONS
from megagpt.model.stream import Cache, Stream
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import part_of
from tests.tolerances import assert_close

BASE = ModelConfig(n_layers=2, d_model=24, n_heads=4, d_ff=40, seq_len=20, vocab_size=37, init="normal", init_std=0.3)
CASES = {
    **{position: replace(BASE, position=position) for position in POSITIONS},
    **{f"{position}, grouped": replace(BASE, position=position, n_kv_heads=2) for position in POSITIONS},
    "GPT-J's rotary, one key head": replace(
        BASE, position="rotary", rotary_interleaved=True, rotary_fraction=0.67, n_kv_heads=1, block="parallel"
    ),
    "T5, few buckets": replace(BASE, position="t5", t5_buckets=6, t5_max_distance=12, attention=("strided:4",)),
    "window": replace(BASE, attention=("window:5", "dense")),
    "bigbird": replace(BASE, attention=("bigbird:3:2:1:1",), position="alibi"),
    "post-norm": replace(BASE, norm_position="post", final_norm=False, embedding_norm=True),
    "parallel, two norms": replace(BASE, block="parallel_two_norms", norm="rmsnorm", activation="swiglu"),
    "PaLM": replace(
        BASE, block="parallel", bias_attention=False, bias_mlp=False, position="rotary", n_kv_heads=1, d_head=8
    ),
    "Monarch": replace(BASE, mlp="monarch", mlp_blocks=4),
}


def model_of(config: ModelConfig) -> GPT:
    """With biases and gains that count."""
    model = GPT(config, SINGLE, seed=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            logical = part_of(parameter).unpadded(parameter)
            logical += 0.1 * torch.randn_like(logical)
    return model


@pytest.mark.parametrize("sizes", [[1] * 20, [7, 1, 1, 5, 6]], ids=["token by token", "a prompt, then more"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_decoding_gives_the_logits_of_the_whole_sequence(name, sizes):
    model, tokens_BT = model_of(CASES[name]), torch.randint(37, (2, 20))
    cache, logits, start = Cache(), [], 0
    for size in sizes:
        positions_BT = torch.arange(start, start + size).expand(2, -1)
        logits.append(model(tokens_BT[:, start : start + size], positions_BT=positions_BT, cache=cache))
        start += size
    assert_close(torch.cat(logits, 1), model(tokens_BT), name)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_positions_count_and_not_the_order_of_the_tokens(name):
    model, tokens_BT = model_of(CASES[name]), torch.randint(37, (2, 20))
    order_BT = torch.stack([torch.randperm(20) for _ in range(2)])
    logits_BTV = model(tokens_BT)
    found = model(tokens_BT.gather(1, order_BT), positions_BT=order_BT)
    assert_close(found, logits_BTV.gather(1, order_BT.unsqueeze(-1).expand_as(found)), name)


@pytest.mark.parametrize("name", ["none", "rotary", "alibi", "transformer_xl", "t5", "T5, few buckets"])
@torch.no_grad()
def test_rows_at_different_positions_decode_side_by_side(name):
    """What knows distances alone gives a text that begins at 6 the logits of one that begins at 0."""
    model, tokens_BT, cache = model_of(CASES[name]), torch.randint(37, (2, 14)), Cache()
    starts_B = torch.tensor([[0], [6]])
    logits = [model(tokens_BT[:, t : t + 1], positions_BT=starts_B + t, cache=cache) for t in range(14)]
    assert_close(torch.cat(logits, 1), model(tokens_BT), name)


def test_attention_dropout_has_no_masks_for_positions():
    model = GPT(replace(BASE, dropout_attention=0.1), SINGLE)
    tokens_BT = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="attention dropout knows tokens by their place in the sample"):
        model(tokens_BT, positions_BT=torch.arange(4)[None])
    model.eval()(tokens_BT, positions_BT=torch.arange(4)[None])


def test_a_cache_wants_positions():
    with pytest.raises(ValueError, match="got a cache without positions_BT"):
        GPT(BASE, SINGLE)(torch.zeros(1, 1, dtype=torch.int64), cache=Cache())


def test_a_pipeline_hands_on_what_a_stream_is_made_from():
    stream = Stream(torch.randn(1, 2, 3), torch.arange(1))
    assert Stream.of(stream.wire) == stream and Stream.of(stream) is stream
