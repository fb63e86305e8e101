"""Conversion to and from transformers' architectures: exact inverses, and one line for what does not fit."""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megagpt.config import ModelConfig, plain
from megagpt.errors import UserError
from megagpt.hf import config_from_hf, hf_config
from megagpt.hf.architecture import share
from megagpt.hf.architectures import ARCHITECTURES
from megagpt.model.gpt import GPT
from megagpt.model.position import POSITIONS
from megagpt.model.position.rotary import SCALINGS
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import part_of
from tests.hf.hf_cases import CASES, Case, state_of, theirs
from tests.hf.load import from_hf, to_hf
from tests.tolerances import assert_equal

ONE_EACH = {case.architecture: case for case in reversed(CASES.values())}
TIED, UNTIED = CASES["gpt2"], CASES["gpt2 untied"]
every = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
one_each = pytest.mark.parametrize("case", ONE_EACH.values(), ids=ONE_EACH.keys())


@every
def test_there_and_back_is_bitwise_the_same(case: Case, tmp_path):
    model = theirs(case)
    ours = from_hf(state_of(model), case.config, case.architecture)
    with torch.device("meta"):
        parameters = dict(GPT(case.config, SINGLE).named_parameters())
    assert {n: tuple(t.shape) for n, t in ours.items()} == {n: part_of(p).shape for n, p in parameters.items()}
    model.save_pretrained(tmp_path)
    files, back = load_file(tmp_path / "model.safetensors"), to_hf(ours, case.config, case.architecture)
    assert back.keys() == files.keys()
    for name, tensor in back.items():
        assert_equal(tensor, files[name], name)
        assert tensor.is_contiguous()  # what safetensors asks for
    again = from_hf(files, case.config, case.architecture)
    assert again.keys() == ours.keys()
    for name, tensor in again.items():
        assert_equal(tensor, ours[name], name)


@every
def test_the_architecture_is_found_and_its_config_comes_back(case: Case):
    found = hf_config(case.config)
    assert found["model_type"] == case.architecture and found == hf_config(case.config, case.architecture)
    for read in (found, theirs(case).config.to_dict()):  # as we write it, and as transformers does
        assert meaning(config_from_hf(read)) == meaning(case.config)


def meaning(config: ModelConfig) -> dict[str, Any]:
    """A configuration without the fields that a trained model does not depend on, its defaults resolved."""
    named = plain(config)
    for name in ("dropout_embedding", "dropout_attention", "dropout_residual", "init", "init_std"):
        del named[name]
    named |= {"n_kv_heads": config.kv_heads, "d_head": config.head_width, "d_ff": config.ff_width}
    if config.rotary_scaling == "ntk":  # as another base
        exponent = config.rotary_width / (config.rotary_width - 2)
        named["rotary_base"] *= named["rotary_factor"] ** exponent
        named |= {"rotary_factor": 1.0, "rotary_scaling": "linear"}
    used = {"yarn": ("beta_fast", "beta_slow"), "llama3": ("low_freq_factor", "high_freq_factor")}
    for name in ("beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
        if name not in used.get(config.rotary_scaling, ()):
            del named[f"rotary_{name}"]
    scaled = config.rotary_scaling in ("dynamic", "yarn", "llama3")
    reach = config.rotary_original_len or round(config.seq_len / config.rotary_factor)
    named["rotary_original_len"] = reach if scaled else None
    grown = config.rotary_attention_factor or 0.1 * math.log(config.rotary_factor) + 1
    named["rotary_attention_factor"] = grown if config.rotary_scaling == "yarn" else None
    return named


OTHERS: dict[str, object] = {
    "n_layers": 3, "d_model": 48, "n_heads": 2, "n_kv_heads": 2, "d_head": 4, "d_ff": 24, "seq_len": 8,
    "vocab_size": 17, "rotary_base": 100.0, "rotary_factor": 3.0, "attention": ("dense", "window:4"), "norm_eps": 1e-3,
    "rotary_fraction": 0.75, "mlp": "low_rank", "logit_scale": 0.5, "activation": "relu2", "mlp_rank": 4,
    "mlp_blocks": 4, "t5_buckets": 8, "t5_max_distance": 9,
    "rotary_original_len": 5, "rotary_beta_fast": 3.0, "rotary_beta_slow": 0.25, "rotary_attention_factor": 1.5,
    "rotary_low_freq_factor": 0.5, "rotary_high_freq_factor": 3.0,
}  # fmt: skip
UNUSED = {"t5_buckets", "t5_max_distance", "mlp_rank", "mlp_blocks"}  # but for what we set beside
CHOICES = {
    "block": ("sequential", "parallel", "parallel_two_norms"),
    "n_classes": (0, 2),
    "position": tuple(POSITIONS),
    "norm": ("layernorm", "rmsnorm"),
    "norm_position": ("pre", "post"),
    "activation": ("gelu_tanh", "gelu", "relu", "relu2", "swiglu", "geglu"),
    "rotary_scaling": tuple(SCALINGS),
}
# What must change with a value, for there to be such a model.
BESIDE: dict[tuple[str, object], dict[str, Any]] = {
    ("mlp", "low_rank"): {"mlp_rank": 4},
    ("norm_position", "post"): {"block": "sequential"},
    ("rotary_original_len", 5): {"rotary_scaling": "yarn", "rotary_factor": 2.0},
    ("rotary_beta_fast", 3.0): {"rotary_scaling": "yarn", "rotary_factor": 2.0},
    ("rotary_beta_slow", 0.25): {"rotary_scaling": "yarn", "rotary_factor": 2.0},
    ("rotary_truncate", False): {"rotary_scaling": "yarn", "rotary_factor": 2.0},
    ("rotary_attention_factor", 1.5): {"rotary_scaling": "yarn", "rotary_factor": 2.0},
    ("rotary_low_freq_factor", 0.5): {"rotary_scaling": "llama3", "rotary_factor": 2.0},
    ("rotary_high_freq_factor", 3.0): {"rotary_scaling": "llama3", "rotary_factor": 2.0},
    ("rotary_scaling", "yarn"): {"rotary_factor": 2.0},
    ("rotary_scaling", "llama3"): {"rotary_factor": 2.0},
    ("rotary_scaling", "dynamic"): {"rotary_factor": 2.0},
    ("block", "parallel"): {"norm_position": "pre"},
    ("block", "parallel_two_norms"): {"norm_position": "pre"},
}


@one_each
def test_no_field_is_lost(case: Case):
    """Whatever is changed comes back from config.json, or is refused by name."""
    names = {f.name for f in fields(ModelConfig)} - UNUSED
    names -= {name for name in names if name.startswith(("dropout", "init"))}
    if case.config.position != "rotary":
        names -= {name for name in names if name.startswith("rotary")}
    if case.config.norm == "rmsnorm":
        names.remove("bias_norm")
    n_refused = 0
    for name in sorted(names):
        now = getattr(case.config, name)
        others = CHOICES.get(name) or ((not now,) if isinstance(now, bool) else (OTHERS[name],))
        for value in others:
            changed = replace(case.config, **BESIDE.get((name, value), {}), **{name: value})
            try:
                back = config_from_hf(hf_config(changed, case.architecture))
            except UserError as error:
                assert "cannot be a" in str(error) and "\n" not in str(error)
                n_refused += value != now
            else:
                assert meaning(back)[name] == meaning(changed)[name], (name, value)
    assert n_refused > 8  # each architecture has its own position, block, norm


@one_each
def test_a_missing_key_has_transformers_default(case: Case):
    defaults = transformers.AutoConfig.for_model(case.architecture).to_dict()
    ours = config_from_hf({"model_type": case.architecture})
    assert meaning(ours) == meaning(config_from_hf(defaults)) and ours.init_std == defaults["initializer_range"]


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # keys of the published config.json, and the parameters it has
    "gpt2": ({"model_type": "gpt2"}, 124_439_808),
    "openai-gpt": ({"model_type": "openai-gpt"}, 116_534_784),
    "pythia-70m": (
        {"model_type": "gpt_neox", "hidden_size": 512, "num_hidden_layers": 6, "num_attention_heads": 8,
         "intermediate_size": 2048, "vocab_size": 50304, "rotary_pct": 0.25, "rotary_emb_base": 10000},
        70_426_624,
    ),
    "gpt-neox-20b": ({"model_type": "gpt_neox"}, 20_554_567_680),
    "gpt-j-6b": ({"model_type": "gptj"}, 6_050_882_784),
    "bloom": (
        {"model_type": "bloom", "n_embed": 14336, "n_layer": 70, "num_attention_heads": 112, "offset_alibi": 100},
        176_247_271_424,
    ),
    "mpt-7b": (
        {"model_type": "mpt", "d_model": 4096, "n_heads": 32, "n_layers": 32, "vocab_size": 50432,
         "learned_pos_emb": True, "attn_config": {"alibi": True, "attn_impl": "torch", "attn_pdrop": 0}},
        6_649_286_656,
    ),
    "llama-7b": ({"model_type": "llama"}, 6_738_415_616),
    "llama-2-70b": (
        {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64,
         "num_key_value_heads": 8, "intermediate_size": 28672, "max_position_embeddings": 4096},
        68_976_648_192,
    ),
    "mistral-7b": ({"model_type": "mistral"}, 7_241_732_096),
    "falcon-7b": ({"model_type": "falcon"}, 6_921_720_704),
    "falcon-40b": (
        {"model_type": "falcon", "hidden_size": 8192, "num_hidden_layers": 60, "num_attention_heads": 128,
         "num_kv_heads": 8, "new_decoder_architecture": True},
        41_303_293_952,
    ),
    "starcoder": (
        {"model_type": "gpt_bigcode", "n_embd": 6144, "n_layer": 40, "n_head": 48, "n_inner": 24576,
         "n_positions": 8192, "vocab_size": 49152, "activation_function": "gelu"},
        15_517_456_384,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str):
    keys, n_expected = PUBLISHED[name]
    config = config_from_hf(keys)
    assert hf_config(config)["model_type"] == keys["model_type"]
    with torch.device("meta"):
        ours = GPT(config, SINGLE)
        expected = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**keys))
    n_parameters = sum(math.prod(part_of(p).shape) for p in ours.parameters())
    assert n_parameters == sum(p.numel() for p in expected.parameters()) == n_expected


LLAMA = hf_config(CASES["llama"].config)


@pytest.mark.parametrize(
    ("rotary", "base", "factor"),
    [
        ({}, 10000.0, 1.0),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, 1.0),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}, 5e5, 2.0),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}, 5e5, 2.0),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default", "factor": 2.0}}, 5e5, 1.0),
    ],
)
def test_rotary_keys_of_all_versions(rotary, base, factor):
    keys = {key: value for key, value in LLAMA.items() if not key.startswith("rope")} | rotary
    config = config_from_hf(keys)
    assert (config.rotary_base, config.rotary_factor) == (base, factor)
    assert meaning(config_from_hf(transformers.LlamaConfig(**keys).to_dict())) == meaning(config)


def test_files_of_a_model_without_its_head_and_of_old_versions():
    buffers = {
        "gpt2": {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.1.attn.masked_bias": torch.tensor(-1e4)},
        "neox": {"layers.0.attention.bias": torch.ones(8), "layers.0.attention.rotary_emb.inv_freq": torch.ones(8)},
        "llama biased": {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},
        "gpt1": {"position_ids": torch.arange(8)},
    }
    for name, more in buffers.items():
        case = CASES[name]
        state = state_of(theirs(case))
        old = {n.split(".", 1)[1] if not n.startswith("lm_head") else n: tensor for n, tensor in state.items()} | more
        if case.config.tied_embeddings:
            del old["lm_head.weight"]
        expected = from_hf(state, case.config, case.architecture)
        found = from_hf(old, case.config, case.architecture)
        assert found.keys() == expected.keys()
        for tensor in found:
            assert_equal(found[tensor], expected[tensor], tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("transformer.h.1.mlp.c_fc.bias"), "have no transformer.h.1.mlp.c_fc.bias"),
        (lambda s: s.update({"transformer.h.2.ln_1.bias": torch.ones(32)}), "hold transformer.h.2.ln_1.bias"),
        (lambda s: s.update({"transformer.wpe.weight": torch.ones(9, 32)}), r"\(9, 32\), wanted \(16, 32\)"),
        (lambda s: s.update({"transformer.h.0.attn.c_attn.weight": torch.ones(96, 32)}), r"wanted \(32, 96\)"),
        (lambda s: s.update({"lm_head.weight": torch.ones(211, 32)}), "lm_head.weight differs from transformer.wte"),
    ],
)
def test_wrong_weights_are_named(change, message):
    state = state_of(theirs(TIED))
    change(state)
    with pytest.raises(UserError, match=message):
        from_hf(state, TIED.config)


NOT_COMPUTED = [
    ("gpt2", {"model_type": "t5"}, "model_type='t5', wanted one of gpt2, openai-gpt"),
    ("gpt2", {"model_type": None}, "model_type=None, wanted one of"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True, wanted False"),
    ("gpt2", {"scale_attn_weights": False}, "scale_attn_weights=False, wanted True"),
    ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True, wanted False"),
    ("gpt2", {"activation_function": "quick_gelu"}, "activation_function='quick_gelu', wanted one of gelu_new"),
    ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4}, wanted None"),
    ("gpt2", {"pruned_heads": {"0": [1]}}, "pruned_heads="),
    ("gpt1", {"afn": "silu"}, "afn='silu', wanted one of gelu, relu"),
    ("neox", {"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope_type='longrope', wanted 'default' or"),
    ("neox", {"head_dim": 4}, "head_dim=4, wanted None or 8"),
    ("falcon new", {"head_dim": 4}, "head_dim=4, wanted None or 8"),
    ("bloom", {"slow_but_exact": True, "pretraining_tp": 2}, "slow_but_exact=True, wanted False"),
    ("gptj", {"rotary_dim": None}, "rotary_dim=None, wanted a number"),
    ("gptj", {"rotary_dim": 3}, "turn pairs of numbers"),
    ("gpt2", {"n_layer": "2"}, "a value of another type than it should be"),
    ("gpt2", {"n_embd": 32.0}, "a value of another type than it should be"),
    ("gpt2", {"tie_word_embeddings": "no"}, "tied_embeddings='no', wanted true or false"),
    ("llama", {"rope_theta": "much"}, "rope_theta='much', wanted a number"),
    ("gptj", {"n_head": 5}, "5 heads and a width of 32"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm=True"),
    ("mpt", {"attn_config": {"qk_ln": True}}, "attn_config.qk_ln=True, wanted False"),
    ("mpt", {"attn_config": {"clip_qkv": 8}}, "attn_config.clip_qkv=8, wanted None"),
    ("mpt", {"attn_config": {"softmax_scale": 1.0}}, "attn_config.softmax_scale=1.0, wanted None"),
    ("mpt", {"attn_config": {"alibi": False}}, "attn_config.alibi=False, wanted True"),
    ("mpt", {"attn_config": {"attn_type": "multiquery_attention"}}, "attn_config.attn_type='multiquery_attention'"),
    ("mpt", {"attn_config": 3}, "attn_config=3, wanted an object"),
    ("mpt", {"no_bias": False}, "no_bias=False, wanted True"),
    ("mpt", {"logit_scale": "inv_sqrt_d_model"}, "logit_scale='inv_sqrt_d_model', wanted None"),
    ("mpt", {"expansion_ratio": 2}, "expansion_ratio=2, wanted 4"),
    ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor=None, wanted a number"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 8, "truncate": None}},
        "truncate=None, wanted True",
    ),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor=None, wanted a number"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}, "rope_scaling": None}, "partial_rotary_factor=0.5"),
    ("llama", {"rope_scaling": "linear"}, "rotary parameters 'linear', wanted one set"),
    ("llama", {"hidden_act": "gelu_new"}, "hidden_act='gelu_new', wanted one of silu"),
    ("llama", {"head_dim": 5}, "heads of width 5"),
    ("llama", {"sliding_window": 4096}, "sliding_window=4096, wanted None"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5, wanted 1.0"),
    ("mistral", {"layer_types": ["full_attention"]}, "layer_types="),
    ("falcon multi-query", {"alibi": True}, "alibi=True, wanted False"),
    ("falcon multi-query", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2 in the old decoder"),
    ("falcon new", {"parallel_attn": False}, "parallel_attn=False in the new decoder"),
    ("bigcode", {"multi_query": False}, "multi_query=False, wanted True"),
]


@pytest.mark.parametrize(("name", "change", "message"), NOT_COMPUTED, ids=[f"{n} {c}" for n, c, _ in NOT_COMPUTED])
def test_config_that_we_do_not_compute_is_refused(name, change, message):
    with pytest.raises(UserError) as refused:
        config_from_hf({**hf_config(CASES[name].config), **change})
    assert message in str(refused.value) and "\n" not in str(refused.value)


@one_each
def test_nonsense_is_refused_in_one_line(case: Case):
    keys = theirs(case).config.to_dict()
    for key in keys:
        for value in (None, "", "x", -1, 0, 1, 7, 1e308, float("nan"), [], [1], {}, {"x": {}}, True, 3.5, 10**30):
            try:
                config = config_from_hf(keys | {key: value})
            except UserError as error:
                assert "\n" not in str(error), (key, value)
            else:
                assert isinstance(config, ModelConfig)


def test_other_spellings_of_keys():
    keys = hf_config(ONE_EACH["bloom"].config)
    old = {{"hidden_size": "n_embed", "n_layer": "num_hidden_layers"}.get(k, k): v for k, v in keys.items()}
    assert config_from_hf(old) == config_from_hf(keys)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"position": "none"}, "the nearest is gpt2: it has model.position=learned, not none"),
        ("llama", {"norm_position": "post"}, "the nearest is llama: it has model.norm_position=pre, not post"),
        ("mistral", {"attention": ("window:5", "dense")}, "the nearest is mistral: it has model.attention=window:5"),
        ("gpt2", {"attention": ("dense", "window:5")}, "gpt2: it has model.attention=dense, not dense window:5"),
        ("mpt", {"bias_mlp": True}, "the nearest is mpt: it has model.bias_mlp=False, not True"),
    ],
)
def test_an_architecture_without_a_place_there_is_refused(name, change, message):
    with pytest.raises(UserError) as refused:
        hf_config(replace(CASES[name].config, **change))
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_another_architecture_may_be_asked_for():
    assert hf_config(CASES["llama"].config, "mistral")["sliding_window"] is None
    with pytest.raises(UserError, match=r"cannot be a gpt_neox of transformers: it has .*model.n_kv_heads=4, not 2"):
        hf_config(CASES["llama"].config, "gpt_neox")
    with pytest.raises(UserError, match="got model_type='gpt3', wanted one of gpt2"):
        to_hf({}, TIED.config, "gpt3")


def test_a_share_of_a_head_gives_its_number_back():
    for whole in range(1, 300):
        assert [int(whole * share(part, whole)) for part in range(whole + 1)] == list(range(whole + 1))


def test_the_page_has_every_architecture():
    page = (Path(__file__).parents[2] / "docs" / "hugging-face.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([\w-]+)` ", page, re.MULTILINE)[1:] == list(ARCHITECTURES)
