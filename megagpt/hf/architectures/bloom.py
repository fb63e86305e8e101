"""BLOOM (Le Scao et al. 2022): ALiBi, and a norm after the embedding."""

from __future__ import annotations

from typing import Any

from megagpt.config import ModelConfig
from megagpt.hf.architecture import Architecture, Keys, require_only
from megagpt.hf.layouts import BY_GROUP


def modules(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    """Ours → theirs."""
    return {
        "embedding.tokens": "transformer.word_embeddings",
        "embedding.norm": "transformer.word_embeddings_layernorm",
        "blocks.{}.norm_1": "transformer.h.{}.input_layernorm",
        "blocks.{}.attention.qkv": "transformer.h.{}.self_attention.query_key_value",
        "blocks.{}.attention.out": "transformer.h.{}.self_attention.dense",
        "blocks.{}.norm_2": "transformer.h.{}.post_attention_layernorm",
        "blocks.{}.mlp.up": "transformer.h.{}.mlp.dense_h_to_4h",
        "blocks.{}.mlp.down": "transformer.h.{}.mlp.dense_4h_to_h",
        "head.norm": "transformer.ln_f",
        "head.tokens": "lm_head",
    }


def to_keys(config: ModelConfig) -> dict[str, Any]:
    """config.json for our architecture."""
    return {
        "vocab_size": config.vocab,
        "seq_length": config.seq_len,
        "hidden_size": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "attention_dropout": config.dropout_attention,
        "hidden_dropout": config.dropout_residual,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
    }


def from_keys(keys: Keys) -> ModelConfig:
    """Our architecture for a config.json."""
    if keys.get("pretraining_tp", 1) > 1:  # then transformers leaves out two biases
        require_only(keys, {"slow_but_exact": (False,)})
    return ModelConfig(
        n_layers=keys.get("n_layer", 2),
        d_model=keys.get("hidden_size", 64),
        n_heads=keys.get("n_head", 8),
        seq_len=keys.get("seq_length", 2048),  # of the published models; ALiBi itself has no limit
        vocab_size=keys.get("vocab_size", 250880),
        position="alibi",
        embedding_norm=True,
        tied_embeddings=keys.get("tie_word_embeddings", True),
        dropout_attention=keys.get("attention_dropout", 0.0),
        dropout_residual=keys.get("hidden_dropout", 0.0),
        norm_eps=keys.get("layer_norm_epsilon", 1e-5),
        init_std=keys.get("initializer_range", 0.02),
    )


BLOOM = Architecture(
    name="bloom",
    model_class="BloomForCausalLM",
    modules=modules,
    to_keys=to_keys,
    from_keys=from_keys,
    qkv=BY_GROUP,
    only={"apply_residual_connection_post_layernorm": (False,)},
    aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
)
