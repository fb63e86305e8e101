"""Decoding with a cache: the logits of the whole sequence, token by token."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megagpt.config import ModelConfig
from megagpt.generate.stage import Stage
from megagpt.model.cache import Cache, View
from megagpt.model.gpt import GPT
from megagpt.model.position import POSITIONS
from megagpt.model.stream import Stream
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.mesh import single_process_mesh
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


def cache_of(config: ModelConfig, n_rows: int) -> Cache:
    places = {"n_rows": n_rows, "n_places": config.seq_len}
    return Cache(config, range(config.n_layers), 1, **places, dtype=torch.float32, device=torch.device("cpu"))


def logits_at(model: GPT, tokens_BT: torch.Tensor, view: View) -> torch.Tensor:
    """Of each token, by the way that the engine takes.  Of BASE only the vocabulary is asked, which all share."""
    blocks = ((f"blocks.{i}", block) for i, block in enumerate(model.blocks))
    layers = [("embedding", model.embedding), *blocks, ("head", model.head)]
    stage = Stage(BASE, single_process_mesh(), layers)
    return stage.logits(stage(tokens_BT, view).flatten(0, 1)).unflatten(0, tokens_BT.shape)


def decode(model: GPT, cache: Cache, rows: list[list[int]], starts: list[int]) -> list[torch.Tensor]:
    """The logits of the next tokens of each row, packed where they are of unequal length."""
    counts = [len(row) for row in rows]
    view = cache.view(0, starts, counts, max(counts))
    shape = (1, sum(counts)) if min(counts) < max(counts) else (len(counts), max(counts))
    tokens_BT = torch.tensor([token for row in rows for token in row]).view(shape)
    return list(logits_at(model, tokens_BT, view).flatten(0, 1).split(counts))


@pytest.mark.parametrize("sizes", [[1] * 20, [7, 1, 1, 5, 6]], ids=["token by token", "a prompt, then more"])
@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_decoding_gives_the_logits_of_the_whole_sequence(name, sizes):
    model, tokens_BT = model_of(CASES[name]), torch.randint(37, (2, 20))
    cache, logits, start = cache_of(CASES[name], 2), [], 0
    for size in sizes:
        found = decode(model, cache, tokens_BT[:, start : start + size].tolist(), [start] * 2)
        logits.append(torch.stack(found))
        start += size
    assert_close(torch.cat(logits, 1), model(tokens_BT), name)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_rows_of_unequal_length_do_not_see_their_padding(name):
    """Three rows, whose tokens come in pieces of unequal length; a fourth place is taken by another row half-way."""
    model, tokens_BT = model_of(CASES[name]), torch.randint(37, (3, 20))
    cache, found = cache_of(CASES[name], 3), [[], [], []]
    done = [0, 0, 0]
    for counts in ([9, 2, 5], [1, 8, 0], [4, 1, 7], [1, 1, 1], [5, 8, 7]):
        rows = [t[s : s + n].tolist() for t, s, n in zip(tokens_BT, done, counts, strict=True)]
        for kept, logits_TV in zip(found, decode(model, cache, rows, done), strict=True):
            kept.append(logits_TV)
        done = [s + n for s, n in zip(done, counts, strict=True)]
    assert done == [20] * 3
    for kept, tokens_T in zip(found, tokens_BT, strict=True):
        assert_close(torch.cat(kept)[None], model(tokens_T[None]), name)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_a_step_over_all_places_is_the_same_step(name):
    """What a CUDA graph does, whose work may not depend on where the rows stand."""
    model, tokens_BT = model_of(CASES[name]), torch.randint(37, (2, 20))
    cache = cache_of(CASES[name], 2)
    decode(model, cache, [tokens_BT[0, :9].tolist(), tokens_BT[1, :4].tolist()], [0, 0])
    positions_B1 = torch.tensor([[9], [4]])
    for _ in range(2):  # once more changes nothing
        next_B1 = tokens_BT.gather(1, positions_B1)
        logits_B1V = logits_at(model, next_B1, cache.whole_view(positions_B1))
    whole_BTV = model(tokens_BT)
    assert_close(logits_B1V[:, 0], torch.stack([whole_BTV[0, 9], whole_BTV[1, 4]]), name)


@torch.no_grad()
def test_the_cache_of_a_window_does_not_grow_beyond_it_and_a_row_can_move():
    config = CASES["window"]
    cache = cache_of(config, 2)
    assert [kv.shape[3] for kv in cache.layers.values()] == [5, 20]
    model, tokens_BT = model_of(config), torch.randint(37, (2, 20))
    decode(model, cache, tokens_BT[:, :13].tolist(), [0, 0])
    cache.move(1, to=0, n=13)
    (found,) = decode(model, cache, tokens_BT[1:, 13:].tolist(), [13])
    assert_close(found, model(tokens_BT[1:])[0, 13:], "row 1 in the place of row 0")


def test_attention_dropout_has_no_masks_for_a_cache():
    model, cache = GPT(replace(BASE, dropout_attention=0.1), SINGLE), cache_of(BASE, 1)
    with pytest.raises(ValueError, match="attention dropout knows tokens by their place in the sample"):
        decode(model, cache, [[1, 2]], [0])
    decode(model.eval(), cache, [[1, 2]], [0])


def test_a_pipeline_hands_on_what_a_stream_is_made_from():
    stream = Stream(torch.randn(1, 2, 3), torch.arange(1))
    assert Stream.of(stream.wire) == stream and Stream.of(stream) is stream
