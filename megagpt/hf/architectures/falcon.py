"""Falcon (Almazrouei et al. 2023): shared keys, rotary, attention and MLP in parallel; the old decoder and the new.

The old one has one key for all heads or one for each; the new one any number, and a norm for each sub-block or one for
both. Its ALiBi is divided by √K with the scores, and rounded to bfloat16: that is not ALiBi as published, and refused.
`output_attentions` asks for what is returned and is not read; transformers 5.23, asked so under sdpa, adds its boolean
mask as 0 and 1, so that every token sees all others.
"""

from __future__ import annotations

from typing import Any

from megagpt.config import ModelConfig
from megagpt.errors import UserError
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
    layer, two = "transformer.h.{}", config.block == "parallel_two_norms"
    return {
        "embedding.tokens": "transformer.word_embeddings",
        "blocks.{}.norm_1": f"{layer}.ln_attn" if two else f"{layer}.input_layernorm",
        "blocks.{}.attention.qkv": f"{layer}.self_attention.query_key_value",
        "blocks.{}.attention.out": f"{layer}.self_attention.dense",
        "blocks.{}.norm_2": f"{layer}.ln_mlp" if two else f"{layer}.post_attention_layernorm",
        "blocks.{}.mlp.up": f"{layer}.mlp.dense_h_to_4h",
        "blocks.{}.mlp.down": f"{layer}.mlp.dense_4h_to_h",
        "head.norm": "transformer.ln_f",
        "head.tokens": "lm_head",
    }


def to_keys(config: ModelConfig) -> dict[str, Any]:
    """config.json for our architecture."""
    parallel, multi_query = config.block != "sequential", config.kv_heads == 1
    new = config.block == "parallel_two_norms" or (parallel and not multi_query)
    return {
        "vocab_size": config.vocab,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_kv_heads": config.kv_heads if new else None,
        "ffn_hidden_size": config.ff_width,
        "new_decoder_architecture": new,
        "num_ln_in_parallel_attn": (2 if config.block == "parallel_two_norms" else 1) if new else None,
        "multi_query": multi_query,
        "parallel_attn": parallel,
        "bias": config.bias_mlp,
        "alibi": False,
        **rotary_keys(config),
        "activation": activation_key(config.activation),
        "attention_dropout": config.dropout_attention,
        "hidden_dropout": config.dropout_residual,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
    }


def from_keys(keys: Keys) -> ModelConfig:
    """Our architecture for a config.json."""
    n_heads, bias = keys.get("num_attention_heads", 71), keys.get("bias", False)
    block, n_kv_heads = _decoder(keys, n_heads)
    require_head_dim(keys, keys.get("hidden_size", 4544), n_heads)
    return ModelConfig(
        n_layers=keys.get("num_hidden_layers", 32),
        d_model=keys.get("hidden_size", 4544),
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_ff=keys.get("ffn_hidden_size"),
        vocab_size=keys.get("vocab_size", 65024),
        block=block,
        **rotary_of(keys, 2048),
        activation=activation_of(keys, "activation", "gelu"),
        bias_attention=bias,
        bias_mlp=bias,
        tied_embeddings=keys.get("tie_word_embeddings", True),
        dropout_attention=keys.get("attention_dropout", 0.0),
        dropout_residual=keys.get("hidden_dropout", 0.0),
        norm_eps=keys.get("layer_norm_epsilon", 1e-5),
        init_std=keys.get("initializer_range", 0.02),
    )


def _decoder(keys: Keys, n_heads: int) -> tuple[Any, int]:
    """The block, and the number of key/value heads."""
    parallel, n_norms = keys.get("parallel_attn", True), keys.get("num_ln_in_parallel_attn")
    if keys.get("new_decoder_architecture", False):
        n_norms = 2 if n_norms is None else n_norms
        if n_norms not in (1, 2) or not parallel:
            raise UserError(
                f"config.json has num_ln_in_parallel_attn={n_norms}, parallel_attn={parallel} in the new decoder, "
                "wanted 1 or 2, and true"
            )
        return ("parallel_two_norms" if n_norms == 2 else "parallel"), keys.get("num_kv_heads") or n_heads
    if n_norms not in (None, 1):
        raise UserError(f"config.json has num_ln_in_parallel_attn={n_norms} in the old decoder, wanted 1")
    return ("parallel" if parallel else "sequential"), 1 if keys.get("multi_query", True) else n_heads


FALCON = Architecture(
    name="falcon",
    model_class="FalconForCausalLM",
    modules=modules,
    to_keys=to_keys,
    from_keys=from_keys,
    qkv=BY_GROUP,
    only={"alibi": (False,), "partial_rotary_factor": (1.0, None)},
    aliases={"n_embed": "hidden_size"},
)
