"""GPTBigCode (Ben Allal et al. 2023): GPT-2 with one key and value for all heads."""

from __future__ import annotations

from typing import Any

from megagpt.config import ModelConfig
from megagpt.hf.architecture import Architecture, Keys
from megagpt.hf.architectures import gpt2
from megagpt.hf.layouts import BY_KIND


def to_keys(config: ModelConfig) -> dict[str, Any]:
    """config.json for our architecture."""
    return gpt2.to_keys(config) | {"multi_query": True}


def from_keys(keys: Keys) -> ModelConfig:
    """Our architecture for a config.json."""
    return ModelConfig(**gpt2.fields(keys, "gelu_pytorch_tanh"), n_kv_heads=1)


GPT_BIGCODE = Architecture(
    name="gpt_bigcode",
    model_class="GPTBigCodeForCausalLM",
    modules=gpt2.modules,
    to_keys=to_keys,
    from_keys=from_keys,
    qkv=BY_KIND,
    only={"scale_attn_weights": (True,), "multi_query": (True,)},
    aliases=gpt2.ALIASES,
)
