"""A small model of every architecture of transformers that we know, each with its odd shapes and its switches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from megagpt.config import ModelConfig
from megagpt.hf import hf_config


@dataclass(frozen=True)
class Case:
    """architecture: its model_type."""

    architecture: str
    config: ModelConfig


# A vocabulary that no axis divides.
_BASE = ModelConfig(n_layers=2, d_model=32, n_heads=4, seq_len=16, vocab_size=211)
_NEOX = replace(
    _BASE, block="parallel_two_norms", position="rotary", rotary_fraction=0.5, activation="gelu", tied_embeddings=False
)
_LLAMA = replace(
    _BASE,
    position="rotary",
    norm="rmsnorm",
    activation="swiglu",
    bias_attention=False,
    bias_mlp=False,
    tied_embeddings=False,
    norm_eps=1e-6,
)
_FALCON = replace(_BASE, position="rotary", activation="gelu", bias_attention=False, bias_mlp=False)

CASES = {
    "gpt2": Case("gpt2", _BASE),
    "gpt2 untied": Case("gpt2", replace(_BASE, tied_embeddings=False, d_ff=48, activation="gelu", norm_eps=1e-3)),
    "gpt1": Case("openai-gpt", replace(_BASE, norm_position="post", final_norm=False)),
    "neox": Case("gpt_neox", replace(_NEOX, d_ff=40)),
    "neox sequential": Case(
        "gpt_neox",
        replace(
            _NEOX,
            block="sequential",
            activation="gelu_tanh",
            rotary_fraction=0.25,
            rotary_base=500.0,
            rotary_factor=2.0,
            bias_attention=False,
            tied_embeddings=True,
        ),
    ),
    "gptj": Case(
        "gptj",
        replace(
            _NEOX,
            block="parallel",
            activation="gelu_tanh",
            d_ff=40,
            rotary_interleaved=True,
            bias_attention=False,
            bias_head=True,
        ),
    ),
    "bloom": Case("bloom", replace(_BASE, d_model=36, n_heads=6, position="alibi", embedding_norm=True)),
    "mpt": Case(
        "mpt",
        replace(
            _BASE,
            d_model=36,
            n_heads=6,
            position="alibi",
            activation="gelu",
            bias_attention=False,
            bias_mlp=False,
            bias_norm=False,
        ),
    ),
    "llama": Case("llama", replace(_LLAMA, d_ff=44, n_kv_heads=2, d_head=6, rotary_base=500.0, rotary_factor=4.0)),
    "llama biased": Case(
        "llama",
        replace(
            _LLAMA,
            activation="geglu",
            tied_embeddings=True,
            bias_attention=True,
            bias_mlp=True,
            rotary_factor=4.0,
            rotary_scaling="ntk",
        ),
    ),
    "mistral": Case("mistral", replace(_LLAMA, d_model=34, d_head=16, n_kv_heads=2, attention=("window:5",))),
    "falcon multi-query": Case("falcon", replace(_FALCON, block="parallel", n_kv_heads=1)),
    "falcon new": Case(
        "falcon",
        replace(
            _FALCON, block="parallel_two_norms", n_kv_heads=2, bias_attention=True, bias_mlp=True, tied_embeddings=False
        ),
    ),
    "falcon one norm": Case("falcon", replace(_FALCON, block="parallel", n_kv_heads=2, d_ff=40)),
    "falcon sequential": Case("falcon", _FALCON),
    "bigcode": Case("gpt_bigcode", replace(_BASE, n_kv_heads=1)),
}


def theirs(case: Case, noise: float = 0.1, **more: Any) -> Any:
    """Their model, in eval mode; noise is added to its first weights, so that biases and gains matter too."""
    import transformers  # two seconds, which no rank needs

    kind = type(transformers.AutoConfig.for_model(case.architecture))
    config = kind(**hf_config(case.config, case.architecture), **more)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.eval()


def state_of(model: Any) -> dict[str, torch.Tensor]:
    """Their weights; a tied head is there once more."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}
