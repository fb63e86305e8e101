"""MPT (MosaicML 2023): ALiBi, no biases at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megagpt.config import ModelConfig
from megagpt.errors import UserError
from megagpt.hf.architecture import Architecture, Keys, require_only
from megagpt.hf.layouts import BY_KIND

_ATTENTION_ONLY = {  # as Architecture.only, within attn_config
    "attn_type": ("multihead_attention",),
    "alibi": (True,),
    "alibi_bias_max": (8,),
    "attn_uses_sequence_id": (False,),
    "clip_qkv": (None,),
    "prefix_lm": (False,),
    "qk_ln": (False,),
    "softmax_scale": (None,),
}


def modules(config: ModelConfig) -> dict[str, str | tuple[str, ...]]:
    """Ours → theirs."""
    return {
        "embedding.tokens": "transformer.wte",
        "blocks.{}.norm_1": "transformer.blocks.{}.norm_1",
        "blocks.{}.attention.qkv": "transformer.blocks.{}.attn.Wqkv",
        "blocks.{}.attention.out": "transformer.blocks.{}.attn.out_proj",
        "blocks.{}.norm_2": "transformer.blocks.{}.norm_2",
        "blocks.{}.mlp.up": "transformer.blocks.{}.ffn.up_proj",
        "blocks.{}.mlp.down": "transformer.blocks.{}.ffn.down_proj",
        "head.norm": "transformer.norm_f",
        "head.tokens": "lm_head",
    }


def to_keys(config: ModelConfig) -> dict[str, Any]:
    """config.json for our architecture."""
    return {
        "vocab_size": config.vocab,
        "max_seq_len": config.seq_len,
        "d_model": config.d_model,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "expansion_ratio": 4,
        "no_bias": True,
        "learned_pos_emb": False,
        "attn_config": {"alibi": True},  # its attn_pdrop is left out: transformers 5 takes whole numbers only
        "resid_pdrop": config.dropout_residual,
        "emb_pdrop": config.dropout_embedding,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
    }


def from_keys(keys: Keys) -> ModelConfig:
    """Our architecture for a config.json."""
    attention = keys.get("attn_config") or {}
    if not isinstance(attention, Mapping):
        raise UserError(f"config.json has attn_config={attention!r}, wanted an object")
    require_only(attention, _ATTENTION_ONLY, "attn_config.")
    return ModelConfig(
        n_layers=keys.get("n_layers", 24),
        d_model=keys.get("d_model", 2048),
        n_heads=keys.get("n_heads", 16),
        seq_len=keys.get("max_seq_len", 2048),
        vocab_size=keys.get("vocab_size", 50368),
        position="alibi",
        activation="gelu",
        bias_attention=False,
        bias_mlp=False,
        bias_norm=False,
        tied_embeddings=keys.get("tie_word_embeddings", True),
        dropout_embedding=keys.get("emb_pdrop", 0.0),
        dropout_attention=attention.get("attn_pdrop", 0.0),
        dropout_residual=keys.get("resid_pdrop", 0.0),
        norm_eps=keys.get("layer_norm_epsilon", 1e-5),
        init_std=keys.get("initializer_range", 0.02),
    )


MPT = Architecture(
    name="mpt",
    model_class="MptForCausalLM",
    modules=modules,
    to_keys=to_keys,
    from_keys=from_keys,
    qkv=BY_KIND,
    only={
        "expansion_ratio": (4,),
        "no_bias": (True,),
        "norm_type": ("low_precision_layernorm", "layernorm"),
        "logit_scale": (None,),
        "embedding_fraction": (1.0,),
    },
    aliases={"hidden_size": "d_model", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"},
)
