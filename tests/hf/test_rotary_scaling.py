"""Rotary frequencies that were changed to reach further: the logits of transformers' own models, and their keys."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megagpt.config import ModelConfig
from megagpt.errors import UserError
from megagpt.generate import generate
from megagpt.generate.request import Sampling
from megagpt.hf import config_from_hf, hf_config
from megagpt.model.gpt import GPT
from megagpt.model.position.rotary import scaling_of
from megagpt.parallel.axis import SINGLE
from tests.hf.hf_cases import CASES, Case, state_of, theirs
from tests.hf.load import from_hf, load_logical
from tests.tolerances import assert_close

# 8 pairs a head, some on each side of each bound and some between.
_LLAMA = replace(CASES["llama"].config, d_head=16, seq_len=64, rotary_base=100.0, rotary_factor=4.0)
_NEOX = replace(CASES["neox"].config, d_head=None, seq_len=64, rotary_factor=4.0, rotary_base=100.0)
_LLAMA3 = replace(_LLAMA, rotary_scaling="llama3", rotary_original_len=16, rotary_low_freq_factor=0.5)
_YARN = replace(_LLAMA, rotary_scaling="yarn", rotary_original_len=16, rotary_beta_fast=2.0, rotary_beta_slow=0.25)
SCALED = {
    "llama3": Case("llama", _LLAMA3),
    "llama3 mistral": Case("mistral", replace(_LLAMA3, attention=("window:7",))),
    "yarn": Case("llama", _YARN),
    "yarn, another magnitude": Case("llama", replace(_YARN, rotary_attention_factor=1.5, rotary_beta_fast=32.0)),
    "yarn, bounds within pairs": Case("llama", replace(_YARN, rotary_truncate=False)),
    "yarn, a part of the head": Case("gpt_neox", replace(_NEOX, rotary_scaling="yarn", rotary_original_len=16)),
    "dynamic": Case("llama", replace(_LLAMA, rotary_scaling="dynamic", rotary_original_len=16)),
    "dynamic falcon": Case(
        "falcon", replace(CASES["falcon new"].config, seq_len=32, rotary_scaling="dynamic", rotary_factor=2.0)
    ),
}


@torch.no_grad()
def ours_of(case: Case, model: Any) -> GPT:
    ours = GPT(case.config, SINGLE).eval()
    load_logical(ours.named_parameters(), from_hf(state_of(model), case.config, case.architecture))
    return ours


@torch.no_grad()
@pytest.mark.parametrize("case", SCALED.values(), ids=SCALED.keys())
def test_logits_are_those_of_transformers(case: Case):
    model = theirs(case, noise=0.3)
    ours, plain = ours_of(case, model), ours_of(replace(case, config=unscaled(case.config)), model)
    original = scaling_of(case.config).original_len
    tokens_BT = torch.randint(case.config.vocab, (2, case.config.seq_len))
    for length in (3, original, original + 5, case.config.seq_len):
        expected_BTV = model(tokens_BT[:, :length]).logits
        found_BTV = ours(tokens_BT[:, :length])
        assert_close(found_BTV, expected_BTV, f"{length} tokens")
        differs = (plain(tokens_BT[:, :length]) - expected_BTV).abs().max() > 1e-3
        assert differs == (case.config.rotary_scaling != "dynamic" or length > original), length


def unscaled(config: ModelConfig) -> ModelConfig:
    return replace(config, rotary_scaling="linear", rotary_factor=1.0)


@pytest.mark.parametrize("case", SCALED.values(), ids=SCALED.keys())
def test_the_keys_come_back(case: Case):
    for keys in (hf_config(case.config, case.architecture), theirs(case).config.to_dict()):
        back = config_from_hf(keys)
        assert (back.seq_len, back.rotary_scaling) == (case.config.seq_len, case.config.rotary_scaling)
        for length in (case.config.seq_len, 20):
            a, b = scaling_of(back), scaling_of(case.config)
            assert torch.equal(a.frequencies(a.length(length)), b.frequencies(b.length(length)))
            assert a.magnitude == b.magnitude


LLAMA_3_1 = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 37,
    "intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 131072, "rope_theta": 500000.0,
}  # fmt: skip
SCALINGS = {
    "llama 3.1": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3",
                  "original_max_position_embeddings": 8192},
    "yarn": {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 8192},
    "yarn without its original": {"rope_type": "yarn", "factor": 16.0},
    "yarn with scales": {"rope_type": "yarn", "factor": 40, "mscale": 0.707, "mscale_all_dim": 1.0},
    "yarn with one scale": {"rope_type": "yarn", "factor": 40, "mscale": 0.707},
    "yarn of no factor": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096},
    "dynamic": {"type": "dynamic", "factor": 2.0},
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_published_forms_have_the_frequencies_of_transformers(name: str):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    keys = LLAMA_3_1 | {"rope_scaling": SCALINGS[name]}
    expected = LlamaRotaryEmbedding(LlamaConfig(**keys))
    scaling = scaling_of(config_from_hf(keys))
    frequencies_R = scaling.frequencies(scaling.length(131072))
    torch.testing.assert_close(frequencies_R.float(), expected.inv_freq, rtol=2e-6, atol=0)
    assert scaling.magnitude == pytest.approx(expected.attention_scaling, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rotary_scaling": "llama3", "rotary_low_freq_factor": 4.0}, "rotary_low_freq_factor=4.0 with rotary_high_fr"),
        ({"rotary_scaling": "yarn", "rotary_beta_slow": 64.0}, "must be turns, the fast ones more than the slow ones"),
        ({"rotary_scaling": "yarn", "rotary_attention_factor": 0.0}, "model.rotary_attention_factor=0.0 must be pos"),
        ({"rotary_original_len": 0}, "model.rotary_original_len=0 must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        replace(_LLAMA, **settings)


@torch.no_grad()
def test_texts_of_a_dynamic_model_are_those_of_transformers_each_by_its_own_length(tmp_path: Path):
    """transformers keeps the angles of the longest text that it has seen: each text by a model that has seen none."""
    case = SCALED["dynamic"]
    theirs(case, noise=0.3).save_pretrained(tmp_path)
    prompts = [(3, 4, 5), tuple(range(1, 12)), tuple(range(1, 20))]  # 16 tokens were trained with
    expected = []
    for prompt in prompts:
        model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        model.generation_config.eos_token_id = None
        found_BT = model.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=0)
        expected.append(found_BT[0, len(prompt) :].tolist())
    ours = generate(tmp_path, prompts, Sampling(n_tokens=24, temperature=0))
    assert [text.tokens for (text,) in ours] == expected
