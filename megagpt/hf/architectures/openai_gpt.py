"""GPT-1 (Radford et al. 2018): norms after the sums, none at the end."""

from __future__ import annotations

from typing import Any

from megagpt.config import ModelConfig
from megagpt.errors import UserError
from megagpt.hf.architecture import Activation, Architecture, Keys
from megagpt.hf.architectures.gpt2 import ALIASES
from megagpt.hf.layouts import BY_KIND

_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu_tanh", "relu": "relu"}  # its "gelu" is the tanh form


def modules(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    """Ours → theirs."""
    return {
        "embedding.tokens": "transformer.tokens_embed",
        "embedding.positions": "transformer.positions_embed.weight",
        "blocks.{}.attention.qkv": "transformer.h.{}.attn.c_attn",
        "blocks.{}.attention.out": "transformer.h.{}.attn.c_proj",
        "blocks.{}.norm_1": "transformer.h.{}.ln_1",
        "blocks.{}.mlp.up": "transformer.h.{}.mlp.c_fc",
        "blocks.{}.mlp.down": "transformer.h.{}.mlp.c_proj",
        "blocks.{}.norm_2": "transformer.h.{}.ln_2",
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
        "afn": "relu" if config.activation == "relu" else "gelu",
        "resid_pdrop": config.dropout_residual,
        "embd_pdrop": config.dropout_embedding,
        "attn_pdrop": config.dropout_attention,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
    }


def from_keys(keys: Keys) -> ModelConfig:
    """Our architecture for a config.json."""
    activation = keys.get("afn", "gelu")
    if activation not in _ACTIVATIONS:
        raise UserError(f"config.json has afn={activation!r}, wanted one of {', '.join(_ACTIVATIONS)}")
    return ModelConfig(
        n_layers=keys.get("n_layer", 12),
        d_model=keys.get("n_embd", 768),
        n_heads=keys.get("n_head", 12),
        seq_len=keys.get("n_positions", 512),
        vocab_size=keys.get("vocab_size", 40478),
        norm_position="post",
        final_norm=False,
        activation=_ACTIVATIONS[activation],
        tied_embeddings=keys.get("tie_word_embeddings", True),
        dropout_embedding=keys.get("embd_pdrop", 0.1),
        dropout_attention=keys.get("attn_pdrop", 0.1),
        dropout_residual=keys.get("resid_pdrop", 0.1),
        norm_eps=keys.get("layer_norm_epsilon", 1e-5),
        init_std=keys.get("initializer_range", 0.02),
    )


OPENAI_GPT = Architecture(
    name="openai-gpt",
    model_class="OpenAIGPTLMHeadModel",
    modules=modules,
    to_keys=to_keys,
    from_keys=from_keys,
    qkv=BY_KIND,
    aliases=ALIASES,
    transposed=True,
)
