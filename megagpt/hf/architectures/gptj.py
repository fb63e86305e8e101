"""GPT-J (Wang & Komatsuzaki 2021): interleaved rotary on a part of each head, one norm for attention and MLP."""

from __future__ import annotations

from typing import Any

from megagpt.config import ModelConfig
from megagpt.errors import UserError
from megagpt.hf.architecture import Architecture, Keys, activation_key, activation_of, head_width, share
from megagpt.hf.architectures.gpt2 import ALIASES
from megagpt.hf.layouts import SEPARATE

_ROTARY_BASE = 10000.0  # it has no key for another


def modules(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    """Ours → theirs."""
    attention = "transformer.h.{}.attn"
    return {
        "embedding.tokens": "transformer.wte",
        "blocks.{}.norm_1": "transformer.h.{}.ln_1",
        "blocks.{}.attention.qkv": (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
        "blocks.{}.attention.out": f"{attention}.out_proj",
        "blocks.{}.mlp.up": "transformer.h.{}.mlp.fc_in",
        "blocks.{}.mlp.down": "transformer.h.{}.mlp.fc_out",
        "head.norm": "transformer.ln_f",
        "head.tokens": "lm_head",
        "head.bias": "lm_head.bias",
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
        "rotary_dim": config.rotary_width,
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
    d_model, n_heads = keys.get("n_embd", 4096), keys.get("n_head", 16)
    width, turned = head_width(d_model, n_heads), keys.get("rotary_dim", 64)
    if not isinstance(turned, int):
        raise UserError(f"config.json has rotary_dim={turned!r}, wanted a number")
    return ModelConfig(
        n_layers=keys.get("n_layer", 28),
        d_model=d_model,
        n_heads=n_heads,
        d_ff=keys.get("n_inner"),
        seq_len=keys.get("n_positions", 2048),
        vocab_size=keys.get("vocab_size", 50400),
        block="parallel",
        position="rotary",
        rotary_base=_ROTARY_BASE,
        rotary_fraction=share(turned, width),
        rotary_interleaved=True,
        activation=activation_of(keys, "activation_function", "gelu_new"),
        bias_attention=False,
        bias_head=True,
        tied_embeddings=keys.get("tie_word_embeddings", False),
        dropout_embedding=keys.get("embd_pdrop", 0.0),
        dropout_attention=keys.get("attn_pdrop", 0.0),
        dropout_residual=keys.get("resid_pdrop", 0.0),
        norm_eps=keys.get("layer_norm_epsilon", 1e-5),
        init_std=keys.get("initializer_range", 0.02),
    )


GPTJ = Architecture(
    name="gptj",
    model_class="GPTJForCausalLM",
    modules=modules,
    to_keys=to_keys,
    from_keys=from_keys,
    qkv=SEPARATE,
    aliases=ALIASES,
)
