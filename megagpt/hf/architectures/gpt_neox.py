"""GPT-NeoX (Black et al. 2022) and Pythia: rotary on a part of each head, attention and MLP in parallel."""

from __future__ import annotations

from typing import Any

from megagpt.config import ModelConfig
from megagpt.hf.architecture import (
    Architecture,
    Keys,
    activation_key,
    activation_of,
    require_head_dim,
    rotary_keys,
    rotary_of,
)
from megagpt.hf.layouts import BY_GROUP


def modules(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    """Ours → theirs."""
    return {
        "embedding.tokens": "gpt_neox.embed_in",
        "blocks.{}.norm_1": "gpt_neox.layers.{}.input_layernorm",
        "blocks.{}.attention.qkv": "gpt_neox.layers.{}.attention.query_key_value",
        "blocks.{}.attention.out": "gpt_neox.layers.{}.attention.dense",
        "blocks.{}.norm_2": "gpt_neox.layers.{}.post_attention_layernorm",
        "blocks.{}.mlp.up": "gpt_neox.layers.{}.mlp.dense_h_to_4h",
        "blocks.{}.mlp.down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "head.norm": "gpt_neox.final_layer_norm",
        "head.tokens": "embed_out",
    }


def to_keys(config: ModelConfig) -> dict[str, Any]:
    """config.json for our architecture."""
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.ff_width,
        "hidden_act": activation_key(config.activation),
        "use_parallel_residual": config.block == "parallel_two_norms",
        "attention_bias": config.bias_attention,
        "rotary_pct": config.rotary_fraction,
        **rotary_keys(config, "rotary_emb_base"),
        "attention_dropout": config.dropout_attention,
        "hidden_dropout": config.dropout_residual,
        "layer_norm_eps": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
    }


def from_keys(keys: Keys) -> ModelConfig:
    """Our architecture for a config.json."""
    scaled = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    dropout = keys.get("hidden_dropout", 0.0)
    require_head_dim(keys, keys.get("hidden_size", 6144), keys.get("num_attention_heads", 64))
    return ModelConfig(
        n_layers=keys.get("num_hidden_layers", 44),
        d_model=keys.get("hidden_size", 6144),
        n_heads=keys.get("num_attention_heads", 64),
        d_ff=keys.get("intermediate_size", 24576),
        vocab_size=keys.get("vocab_size", 50432),
        block="parallel_two_norms" if keys.get("use_parallel_residual", True) else "sequential",
        **rotary_of(keys, 2048, "rotary_emb_base", is_partial=True),
        rotary_fraction=scaled.get("partial_rotary_factor", keys.get("rotary_pct", 0.25)),
        activation=activation_of(keys, "hidden_act", "gelu"),
        bias_attention=keys.get("attention_bias", True),
        tied_embeddings=keys.get("tie_word_embeddings", False),
        dropout_embedding=dropout,
        dropout_attention=keys.get("attention_dropout", 0.0),
        dropout_residual=dropout,
        norm_eps=keys.get("layer_norm_eps", 1e-5),
        init_std=keys.get("initializer_range", 0.02),
    )


GPT_NEOX = Architecture(
    name="gpt_neox",
    model_class="GPTNeoXForCausalLM",
    modules=modules,
    to_keys=to_keys,
    from_keys=from_keys,
    qkv=BY_GROUP,
    root="gpt_neox.",
    renamed={"lm_head.": "embed_out."},
)
