"""Conversion to and from transformers' GPT-2: exact inverses, and one line for what does not fit."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import transformers

from megagpt.config import ModelConfig
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.model.hf import config_from_hf, from_hf, hf_config, load_logical, to_hf
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.parameter import part_of
from tests.tolerances import assert_equal

TIED = ModelConfig(n_layers=2, d_model=16, n_heads=4, seq_len=8, vocab_size=37)
UNTIED = replace(TIED, tied_embeddings=False, d_ff=24)
both = pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])


def theirs(config: ModelConfig) -> transformers.GPT2LMHeadModel:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(config)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return model


@both
def test_there_and_back_is_bitwise_the_same(config):
    state = theirs(config).state_dict()
    ours = from_hf(state, config)
    assert {n: tuple(t.shape) for n, t in ours.items()} == {
        n: part_of(p).shape for n, p in GPT(config, SINGLE).named_parameters()
    }
    back = to_hf(ours, config)
    assert state.keys() - back.keys() == ({"lm_head.weight"} if config.tied_embeddings else set())
    for name, tensor in back.items():
        assert_equal(tensor, state[name], name)
        assert tensor.is_contiguous()  # what safetensors asks for
    again = from_hf(back, config)
    assert again.keys() == ours.keys()
    for name, tensor in again.items():
        assert_equal(tensor, ours[name], name)


@both
def test_transformers_loads_what_we_write(config):
    model = theirs(config)
    tensors = to_hf(from_hf(model.state_dict(), config), config)
    other = theirs(config)
    missing, unexpected = other.load_state_dict(tensors, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not unexpected
    tokens = torch.randint(0, config.vocab, (2, 5))
    assert_equal(other.eval()(tokens).logits, model.eval()(tokens).logits)


def test_old_files_lack_the_prefix_and_hold_masks():
    state = theirs(TIED).state_dict()
    old = {name.removeprefix("transformer."): t for name, t in state.items() if name != "lm_head.weight"}
    old["h.0.attn.bias"], old["h.1.attn.masked_bias"] = torch.ones(1, 1, 8, 8), torch.tensor(-1e4)
    expected = from_hf(state, TIED)
    for name, tensor in from_hf(old, TIED).items():
        assert_equal(tensor, expected[name], name)


def test_state_is_left_alone():
    state = theirs(TIED).state_dict()
    names = list(state)
    from_hf(state, TIED)
    assert list(state) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("transformer.h.1.mlp.c_fc.bias"), "have no transformer.h.1.mlp.c_fc.bias"),
        (lambda s: s.update({"transformer.h.2.ln_1.bias": torch.ones(16)}), "hold transformer.h.2.ln_1.bias"),
        (lambda s: s.update({"transformer.wpe.weight": torch.ones(9, 16)}), r"\(9, 16\), wanted \(8, 16\)"),
        (lambda s: s.update({"transformer.h.0.attn.c_attn.weight": torch.ones(48, 16)}), r"wanted \(16, 48\)"),
        (lambda s: s.update({"lm_head.weight": torch.ones(37, 16)}), "lm_head.weight differs from wte.weight"),
    ],
)
def test_wrong_weights_are_named(change, message):
    state = dict(theirs(TIED).state_dict())
    change(state)
    with pytest.raises(UserError, match=message):
        from_hf(state, TIED)


@both
def test_config_there_and_back(config):
    config = replace(
        config, dropout_attention=0.1, dropout_embedding=0.2, dropout_residual=0.3, norm_eps=1e-6, init_std=0.01
    )
    assert config_from_hf(hf_config(config)) == config
    assert config_from_hf(transformers.GPT2Config(**hf_config(config)).to_dict()) == config


def test_published_config():
    # The defaults of transformers are those of the 124M model.
    config = config_from_hf(transformers.GPT2Config().to_dict())
    assert config == config_from_hf({})
    assert (config.n_layers, config.d_model, config.n_heads, config.seq_len, config.vocab) == (12, 768, 12, 1024, 50257)
    with torch.device("meta"):
        assert sum(math.prod(part_of(p).shape) for p in GPT(config, SINGLE).parameters()) == 124_439_808


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "llama"),
        ("scale_attn_by_inverse_layer_idx", True),
        ("scale_attn_weights", False),
        ("add_cross_attention", True),
        ("activation_function", "relu"),
    ],
)
def test_config_that_we_do_not_compute_is_refused(key, value):
    with pytest.raises(UserError, match=f"{key}={value!r}, wanted"):
        config_from_hf({**hf_config(TIED), key: value})


@pytest.mark.parametrize(("field", "value"), [("position", "none"), ("d_head", 8)])
def test_architecture_without_a_place_in_gpt2_is_refused(field, value):
    with pytest.raises(UserError, match=f"model.{field}={value} cannot be exported"):
        to_hf({}, replace(TIED, **{field: value}))


@both
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_load_logical_fills_each_rank_with_its_part(config, tp):
    tensors = from_hf(theirs(config).state_dict(), config)
    for rank in range(tp):
        model = GPT(config, Axis(group=None, rank=rank, size=tp))
        load_logical(model.named_parameters(), tensors)
        for name, parameter in model.named_parameters():
            part = part_of(parameter)
            assert_equal(part.unpadded(parameter.detach()), part.take(tensors[name]), name)
            assert parameter.count_nonzero() == part.take(tensors[name]).count_nonzero()  # the padding is zero


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("head.norm.bias"), "no tensor for head.norm.bias;"),
        (
            lambda t: [t.pop(n) for n in list(t) if n.startswith("blocks.1.")],
            "blocks.1.attention.out.bias.* and 9 more",
        ),
        (lambda t: t.update({"blocks.9.norm_1.bias": torch.ones(16)}), "the model has no blocks.9.norm_1.bias"),
        (lambda t: t.update({"head.norm.bias": torch.ones(17)}), r"head.norm.bias has shape \(17,\), wanted \(16,\)"),
    ],
)
def test_load_logical_names_what_is_wrong_and_copies_nothing(change, message):
    model = GPT(TIED, SINGLE)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tensors = {name: torch.full(part_of(p).shape, 5.0) for name, p in model.named_parameters()}
    change(tensors)
    with pytest.raises(UserError, match=message):
        load_logical(model.named_parameters(), tensors)
    for name, parameter in model.named_parameters():
        assert_equal(parameter.detach(), before[name], name)


def test_load_logical_of_one_stage_passes_over_the_rest():
    model = GPT(TIED, SINGLE)
    tensors = {name: torch.full(part_of(p).shape, 5.0, dtype=torch.float64) for name, p in model.named_parameters()}
    block = [(f"blocks.1.{name}", p) for name, p in model.blocks[1].named_parameters()]
    load_logical(block, tensors, whole_model=False)
    for name, parameter in model.named_parameters():
        assert (parameter == 5.0).all() == name.startswith("blocks.1."), name
