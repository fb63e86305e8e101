"""Architectures that contradict themselves: one line, with what to do."""

from __future__ import annotations

import pytest

from megagpt.config import ModelConfig
from megagpt.errors import UserError

REFUSED = {
    "window": ({"attention": ("dense", "window:512")}, "reaches 512 tokens, further than the context"),
    "BigBird": ({"attention": ("bigbird:64:3:1:1",)}, "reaches 320 tokens, further than the context"),
    "no pattern": ({"attention": ("banded:4",)}, "is no pattern; use dense, window:W"),
    "no attention": ({"attention": ()}, "model.attention is empty; use dense"),
    "odd rotary": ({"position": "rotary", "d_head": 5}, "must turn pairs of numbers within a head, not 5 of 5"),
    "odd share": ({"position": "rotary", "rotary_fraction": 0.02}, "must turn pairs of numbers within a head, not 0"),
    "post, parallel": (
        {"norm_position": "post", "block": "parallel"},
        "model.norm_position=post with model.block=parallel has no sum to normalise after attention",
    ),
    "T5, near": (
        {"position": "t5", "t5_max_distance": 16},
        "model.t5_buckets=32 with model.t5_max_distance=16 leave nothing",
    ),
    "T5, one bucket": ({"position": "t5", "t5_buckets": 1}, "use 2 buckets or more"),
    "key heads": ({"n_kv_heads": 3}, "model.n_kv_heads=3 with model.n_heads=4"),
    "rank of a dense MLP": ({"mlp_rank": 8}, "model.mlp=dense with model.mlp_rank=8 says what only low_rank has"),
    "low rank without one": ({"mlp": "low_rank"}, "model.mlp=low_rank with model.mlp_rank=None needs mlp_rank"),
    "Monarch": ({"mlp": "monarch", "mlp_blocks": 7}, "must divide d_model=192, d_ff=768"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_contradicts_itself_is_one_message_with_a_remedy(name):
    settings, expected = REFUSED[name]
    with pytest.raises(UserError) as caught:
        ModelConfig(**settings)
    assert expected in str(caught.value)
    assert "; " in str(caught.value)
    assert "\n" not in str(caught.value)
