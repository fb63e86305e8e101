"""Transformer-XL's and T5's positions, against the papers' formulas written as loops and against transformers' T5."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megagpt.config import ModelConfig
from megagpt.inventory import layers as inventory
from megagpt.model.attention.attention import Attention
from megagpt.model.position.kind import shift
from megagpt.model.position.t5 import bucket
from megagpt.model.stream import Stream
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import Declared
from tests.tolerances import assert_close, assert_equal

XL = ModelConfig(
    n_layers=1, d_model=20, n_heads=4, d_head=6, seq_len=16, vocab_size=7, position="transformer_xl", init_std=0.5
)
T5 = replace(XL, position="t5", t5_buckets=8, t5_max_distance=12)


def attention(config: ModelConfig) -> Attention:
    return Attention(config, 0, SINGLE, Declared("a", inventory.attention(config, 0), seed=1))


def reach(T: int) -> Tensor:
    """Which scores count."""
    return torch.ones(T, T, dtype=torch.bool).tril()


@pytest.mark.parametrize("T", [1, 5, 16])
@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_transformer_xl_scores_are_the_sum_of_four_terms(T, n_kv_heads):
    """Dai et al. 2019, section 3.3: each score by itself."""
    module = attention(XL).double()
    relative = module.get_submodule("relative")
    q_BHTK = torch.randn(2, 4, T, 6, dtype=torch.float64, requires_grad=True)
    k_BGTK = torch.randn(2, n_kv_heads, T, 6, dtype=torch.float64, requires_grad=True)
    leaves = [q_BHTK, k_BGTK, *relative.parameters()]
    W_HKD = relative.weight.view(4, 6, 20)

    def sinusoid(distance: int) -> Tensor:  # Vaswani et al. 2017, section 3.5
        angles = [distance / 10000 ** (2 * (d // 2) / 20) for d in range(20)]
        return torch.tensor([math.cos(a) if d % 2 else math.sin(a) for d, a in enumerate(angles)], dtype=torch.float64)

    rows = []
    for b in range(2):
        for h in range(4):
            u, v, W, k_TK = relative.content_bias[h], relative.position_bias[h], W_HKD[h], k_BGTK[b]
            for i in range(T):
                for j in range(i + 1):
                    q, k, r = q_BHTK[b, h, i], k_TK[h // (4 // n_kv_heads), j], sinusoid(i - j)
                    rows.append(q @ k + q @ (W @ r) + u @ k + v @ (W @ r))
    expected = torch.stack(rows)
    scores = module.learned(module.position.scores, q_BHTK, k_BGTK)[:, :, reach(T)].flatten()
    assert_close(scores, expected)
    dy = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(x, leaves, dy, retain_graph=True) for x in (scores, expected))
    for a, b, name in zip(ours, theirs, ("q", "k", "W", "u", "v"), strict=True):
        assert_close(a, b, f"gradient of {name}")


def test_transformer_xl_has_a_projection_more():
    """13 · L · d² parameters in all (Gopher's sizes): 12 and the projection of distances."""
    square = replace(XL, d_model=24)
    assert {n: tuple(p.shape) for n, p in attention(square).named_parameters() if "relative" in n} == {
        "relative.weight": (24, 24),
        "relative.content_bias": (4, 6),
        "relative.position_bias": (4, 6),
    }


def test_shift_moves_each_row_to_its_keys():
    x = torch.arange(2 * 3 * 25.0).view(2, 3, 5, 5)
    y = shift(x)
    for i in range(5):
        for j in range(i + 1):
            assert_equal(y[..., i, j], x[..., i, 4 - (i - j)])


@pytest.mark.parametrize(("n_buckets", "max_distance"), [(32, 128), (8, 12), (8, 64), (2, 5), (64, 4096)])
def test_buckets_are_transformers_own(n_buckets, max_distance):
    from transformers.models.t5.modeling_t5 import T5Attention  # 2 s, and no other test here needs it

    distance = torch.arange(2 * max_distance)
    theirs = T5Attention._relative_position_bucket(
        -distance, bidirectional=False, num_buckets=n_buckets, max_distance=max_distance
    )
    assert_equal(bucket(distance, n_buckets, max_distance), theirs)
    assert bucket(torch.tensor([0, max_distance]), n_buckets, max_distance).tolist() == [0, n_buckets - 1]


@pytest.mark.parametrize("T", [1, 5, 16])
def test_t5_attention_is_transformers_own(T):
    """Its layer with our weights; it does not divide scores by √K, so that its queries are made that much smaller."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    theirs = T5Attention(
        T5Config(
            d_model=20,
            num_heads=4,
            d_kv=6,
            is_decoder=True,
            dropout_rate=0.0,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=12,
        ),
        has_relative_attention_bias=True,
        layer_idx=0,
    ).double()
    config = replace(T5, bias_attention=False)
    ours = attention(config).double()
    assert ours.qkv is not None
    buckets = ours.get_parameter("buckets.weight")
    with torch.no_grad():
        q, k, v = ours.qkv.weight.view(4, 3, 6, 20).transpose(0, 1).reshape(3, 24, 20)
        theirs.q.weight.copy_(q / math.sqrt(6))
        theirs.k.weight.copy_(k)
        theirs.v.weight.copy_(v)
        theirs.o.weight.copy_(ours.out.weight)
        theirs.relative_attention_bias.weight.copy_(buckets)
    x_BTD = torch.randn(2, T, 20, dtype=torch.float64)
    mask = torch.zeros(1, 1, T, T, dtype=torch.float64).masked_fill(~reach(T), -torch.inf)
    expected = theirs(x_BTD, mask=mask)[0]
    y_BTD = ours(Stream(x_BTD, torch.arange(2)))
    assert_close(y_BTD, expected)
    dy = torch.randn_like(expected)
    (grad,) = torch.autograd.grad(y_BTD, [buckets], dy)
    (wanted,) = torch.autograd.grad(expected, [theirs.relative_attention_bias.weight], dy)
    assert_close(grad, wanted, "gradient of the buckets")


def test_t5_bias_is_a_row_of_its_table():
    module = attention(T5)
    bias_HTT = module.learned(module.position.bias, torch.empty(1, 4, 16, 1))
    for i in range(16):
        for j in range(i + 1):
            row = bucket(torch.tensor(i - j), 8, 12)
            assert_equal(bias_HTT[:, i, j], module.get_parameter("buckets.weight")[row])
