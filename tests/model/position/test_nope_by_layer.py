"""NoPE by layer: equal to transformers' SmolLM3, the same on every layout, and known to the plan."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megagpt.config import ModelConfig
from megagpt.hf.convert import lazy_to_hf
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import part_of
from megagpt.plan.plan import make_plan
from tests.parity.walk import REFERENCE, Layout, compare, parity_config, run_layout, spread_out

MODEL = ModelConfig(
    n_layers=5, d_model=32, n_heads=4, n_kv_heads=2, d_ff=48, seq_len=24, vocab_size=211, position="nope_by_layer",
    norm="rmsnorm", activation="swiglu", bias_attention=False, bias_mlp=False,
)  # fmt: skip


def test_it_computes_what_smollm3_computes():
    transformers = pytest.importorskip("transformers")
    model = dataclasses.replace(MODEL, init_std=0.2)  # so that what layers differ by is seen
    ours = GPT(model, SINGLE, seed=1).eval()
    theirs = transformers.SmolLM3ForCausalLM(
        transformers.SmolLM3Config(
            vocab_size=211, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=24, rms_norm_eps=1e-5, no_rope_layer_interval=4,
            rope_theta=10000.0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=1,
        )
    ).eval()  # fmt: skip
    parts = ((name, part_of(p).unpadded(p.detach())) for name, p in ours.named_parameters())
    as_llama = lazy_to_hf(dict(parts).__getitem__, dataclasses.replace(model, position="rotary"), "llama")
    theirs.load_state_dict({name: tensor.get() for name, tensor in as_llama.items()}, strict=False)
    tokens_BT = torch.randint(211, (2, 24))
    assert (ours(tokens_BT)[..., :211] - theirs(tokens_BT).logits).abs().max() < 1e-5
    all_turned = GPT(dataclasses.replace(model, position="rotary"), SINGLE, seed=1).eval()
    assert (ours(tokens_BT) - all_turned(tokens_BT)).abs().max() > 1e-3  # the fourth layer counts


LAYOUTS = [Layout(tp=2, pp=2, micro_batch_size=2), Layout(tp=2, dp=2, zero_stage=3, micro_batch_size=1)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_is_the_same_on_every_layout(layout):
    config = parity_config(dataclasses.replace(MODEL, dropout_attention=0.1, dropout_residual=0.1))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, train_steps=6))
    difference = compare(run_layout(config, layout), run_layout(config, REFERENCE), config)
    assert difference.ok, difference


def test_the_plan_knows_it():
    config = spread_out(parity_config(MODEL), LAYOUTS[0])
    rotary = dataclasses.replace(config, model=dataclasses.replace(MODEL, position="rotary"))
    assert make_plan(config, 4) == make_plan(rotary, 4)
