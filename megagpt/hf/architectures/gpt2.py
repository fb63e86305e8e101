"""GPT-2 (Radford et al. 2019)."""

from __future__ import annotations

from typing import Any

from megagpt.config import ModelConfig
from megagpt.hf.architecture import Architecture, Keys, activation_key, activation_of
from megagpt.hf.layouts import BY_KIND


def modules(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    """Ours → theirs."""
    return {
        "embedding.tokens": "transformer.wte",
        "embedding.positions": "transformer.wpe.weight",
        "blocks.{}.norm_1": "transformer.h.{}.ln_1",
        "blocks.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
        "blocks.{}.attention.out": "transformer.h.{}.attn.c_proj",
        "blocks.{}.norm_2": "transformer.h.{}.ln_2",
        "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
        "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
        "head.norm": "transformer.ln_f",
        "head.tokens": "lm_head",
    }


def to_keys(config: ModelConfig) -> dict[str, Any]:
    """config.json for our architecture."""
    return {
        "vocab_size": config.vocab,
        "n_positions": config.seq_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": activation_key(config.activation),
        "resid_pdrop": config.dropout_residual,
        "embd_pdrop": config.dropout_embedding,
        "attn_pdrop": config.dropout_attention,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
    }


def from_keys(keys: Keys) -> ModelConfig:
    """Our architecture for a config.json."""
    return ModelConfig(**fields(keys, "gelu_new"))


def fields(keys: Keys, activation: str) -> dict[str, Any]:
    """What GPT-2 and the architectures with its keys have in common. activation: the default one."""
    return {
        "n_layers": keys.get("n_layer", 12),
        "d_model": keys.get("n_embd", 768),
        "n_heads": keys.get("n_head", 12),
        "d_ff": keys.get("n_inner"),
        "seq_len": keys.get("n_positions", 1024),
        "vocab_size": keys.get("vocab_size", 50257),
        "activation": activation_of(keys, "activation_function", activation),
        "tied_embeddings": keys.get("tie_word_embeddings", True),
        "dropout_embedding": keys.get("embd_pdrop", 0.1),
        "dropout_attention": keys.get("attn_pdrop", 0.1),
        "dropout_residual": keys.get("resid_pdrop", 0.1),
        "norm_eps": keys.get("layer_norm_epsilon", 1e-5),
        "init_std": keys.get("initializer_range", 0.02),
    }


ALIASES = {
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}

GPT2 = Architecture(
    name="gpt2",
    model_class="GPT2LMHeadModel",
    modules=modules,
    to_keys=to_keys,
    from_keys=from_keys,
    qkv=BY_KIND,
    only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,)},
    aliases=ALIASES,
    transposed=True,
)
