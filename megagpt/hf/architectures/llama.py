"""LLaMA (Touvron et al. 2023): RMSNorm, rotary, SwiGLU; and Mistral (Jiang et al. 2023), which adds a window."""

from __future__ import annotations

from typing import Any

from megagpt.config import ModelConfig
from megagpt.config.pattern import Pattern
from megagpt.hf.architecture import (
    Architecture,
    Keys,
    activation_key,
    activation_of,
    head_width,
    rotary_keys,
    rotary_of,
)
from megagpt.hf.layouts import SEPARATE


def modules(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    """Ours → theirs."""
    attention, mlp = "model.layers.{}.self_attn", "model.layers.{}.mlp"
    return {
        "embedding.tokens": "model.embed_tokens",
        "blocks.{}.norm_1": "model.layers.{}.input_layernorm",
        "blocks.{}.attention.qkv": (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        "blocks.{}.attention.out": f"{attention}.o_proj",
        "blocks.{}.norm_2": "model.layers.{}.post_attention_layernorm",
        "blocks.{}.mlp.up": (f"{mlp}.gate_proj", f"{mlp}.up_proj"),
        "blocks.{}.mlp.down": f"{mlp}.down_proj",
        "head.norm": "model.norm",
        "head.tokens": "lm_head",
    }


def to_keys(config: ModelConfig) -> dict[str, Any]:
    """config.json of a LLaMA for our architecture."""
    return _shared_keys(config) | {"attention_bias": config.bias_attention, "mlp_bias": config.bias_mlp}


def from_keys(keys: Keys) -> ModelConfig:
    """Our architecture for the config.json of a LLaMA."""
    fields = _shared_fields(keys, d_ff=11008, seq_len=2048, n_kv_heads=keys.get("num_attention_heads", 32))
    head_width(fields["d_model"], fields["n_heads"])  # asked for even where head_dim says another
    return ModelConfig(**fields, bias_attention=keys.get("attention_bias", False), bias_mlp=keys.get("mlp_bias", False))


def mistral_to_keys(config: ModelConfig) -> dict[str, Any]:
    """config.json of a Mistral for our architecture; every layer has the first one's window."""
    pattern = config.pattern(0)
    return _shared_keys(config) | {"sliding_window": pattern.numbers[0] if pattern.kind == "window" else None}


def mistral_from_keys(keys: Keys) -> ModelConfig:
    """Our architecture for the config.json of a Mistral. A window as long as the context is none."""
    fields = _shared_fields(keys, d_ff=14336, seq_len=4096 * 32, n_kv_heads=8)
    window = keys.get("sliding_window", 4096)
    attention = Pattern() if window is None or window > fields["seq_len"] else Pattern.parse(f"window:{window}")
    return ModelConfig(**fields, attention=(attention,), bias_attention=False, bias_mlp=False)


def _shared_keys(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.ff_width,
        "hidden_act": activation_key(config.activation, gated=True),
        **rotary_keys(config),
        "attention_dropout": config.dropout_attention,
        "rms_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
    }


def _shared_fields(keys: Keys, *, d_ff: int, seq_len: int, n_kv_heads: int) -> dict[str, Any]:
    return {
        "n_layers": keys.get("num_hidden_layers", 32),
        "d_model": keys.get("hidden_size", 4096),
        "n_heads": keys.get("num_attention_heads", 32),
        "n_kv_heads": keys.get("num_key_value_heads", n_kv_heads),
        "d_head": keys.get("head_dim"),
        "d_ff": keys.get("intermediate_size", d_ff),
        "vocab_size": keys.get("vocab_size", 32000),
        **rotary_of(keys, seq_len),
        "norm": "rmsnorm",
        "activation": activation_of(keys, "hidden_act", "silu", gated=True),
        "tied_embeddings": keys.get("tie_word_embeddings", False),
        "dropout_attention": keys.get("attention_dropout", 0.0),
        "norm_eps": keys.get("rms_norm_eps", 1e-6),
        "init_std": keys.get("initializer_range", 0.02),
    }


LLAMA = Architecture(
    name="llama",
    model_class="LlamaForCausalLM",
    modules=modules,
    to_keys=to_keys,
    from_keys=from_keys,
    qkv=SEPARATE,
    only={"partial_rotary_factor": (1.0, None), "sliding_window": (None,)},
    root="model.",
)

MISTRAL = Architecture(
    name="mistral",
    model_class="MistralForCausalLM",
    modules=modules,
    to_keys=mistral_to_keys,
    from_keys=mistral_from_keys,
    qkv=SEPARATE,
    only={"partial_rotary_factor": (1.0, None)},
    root="model.",
)
