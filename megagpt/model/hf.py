"""Weights and configurations in the names of Hugging Face `transformers`, both ways, without importing it.

One architecture is one table: our canonical name, their name, and how a tensor changes between them.
Tensors here are logical ones (whole, vocabulary unpadded); one that needs no change is passed on, not copied.

Shapes: D model, H all heads, K head width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.errors import UserError
from megagpt.parallel.parameter import part_of


def from_hf_gpt2(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The weights of a `GPT2LMHeadModel` under our canonical names.

    state: by their names, with or without the leading "transformer."; old files' causal masks are left out.
    Raises UserError naming a tensor that is missing, unknown, or of another shape than config's.
    """
    return {name: lazy.get() for name, lazy in lazy_from_hf_gpt2(state, state.__getitem__, config).items()}


def lazy_from_hf_gpt2(
    names: Iterable[str], read: Callable[[str], Tensor], config: ModelConfig
) -> dict[str, LazyTensor]:
    """The same for weights that need not fit into memory. read: gives the tensor of one of the names.

    Raises UserError at once where a name is missing or unknown; for another shape when that tensor is asked for.
    """
    found = {name if name.startswith(_GPT2_ROOTS) else f"transformer.{name}": name for name in names}
    found = {name: as_given for name, as_given in found.items() if not _GPT2_MASKS.search(name)}
    if config.tied_embeddings and (copy := found.pop("lm_head.weight", None)) and "transformer.wte.weight" in found:
        _require_equal(read(copy), read(found["transformer.wte.weight"]))
    ours = {}
    for rule, i in _expand(GPT2, config):
        name, shape = rule.theirs.format(i), rule.shape(config)
        if name not in found:
            raise UserError(f"the weights have no {name}; wanted a GPT-2 of {config.n_layers} layers; check the config")

        def get(rule: Rule = rule, name: str = name, as_given: str = found.pop(name)) -> Tensor:
            tensor = read(as_given)
            _require_shape(name, tensor, rule.shape(config))
            return rule.change.to_ours(tensor, config)

        changed = rule.change.to_ours(torch.empty(shape, device="meta"), config)
        ours[rule.ours.format(i)] = LazyTensor(tuple(changed.shape), get)
    if found:
        raise UserError(f"the weights hold {_few(found)}, not in a GPT-2 of {config.n_layers} layers; check the config")
    return ours


def to_hf_gpt2(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Canonical logical tensors under `GPT2LMHeadModel`'s names; the exact inverse of `from_hf_gpt2`.

    With tied embeddings there is no lm_head.weight, as in the files that transformers writes.
    Raises UserError where GPT-2 has no place for the architecture.
    """
    return {name: lazy.get() for name, lazy in lazy_to_hf_gpt2(tensors.__getitem__, config).items()}


def lazy_to_hf_gpt2(read: Callable[[str], Tensor], config: ModelConfig) -> dict[str, LazyTensor]:
    """The same for weights that need not fit into memory. read: gives the tensor of a canonical name."""
    hf_config(config)  # raises

    def get(rule: Rule, i: int) -> Tensor:
        return rule.change.to_theirs(read(rule.ours.format(i)), config)

    return {
        rule.theirs.format(i): LazyTensor(rule.shape(config), partial(get, rule, i))
        for rule, i in _expand(GPT2, config)
    }


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a `GPT2LMHeadModel` with this architecture; bos and eos ids are the caller's to add.

    Raises UserError where GPT-2 has no place for the architecture.
    """
    for field, theirs in (("position", ("learned",)), ("norm", ("layernorm",)), ("activation", ("gelu_tanh", "gelu"))):
        value = getattr(config, field)
        if value not in theirs:
            raise UserError(f"model.{field}={value} cannot be exported as GPT-2; it has {field}={' or '.join(theirs)}")
    if config.head_width * config.n_heads != config.d_model:
        raise UserError(
            f"model.d_head={config.head_width} cannot be exported as GPT-2; its d_head is d_model / n_heads, "
            f"here {config.d_model}/{config.n_heads}"
        )
    return {
        **_GPT2_ONLY,
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab,
        "n_positions": config.seq_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layers,
        "n_head": config.n_heads,
        "n_inner": config.d_ff,
        "activation_function": {"gelu_tanh": "gelu_new", "gelu": "gelu"}[config.activation],
        "resid_pdrop": config.dropout_residual,
        "embd_pdrop": config.dropout_embedding,
        "attn_pdrop": config.dropout_attention,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied_embeddings,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def config_from_hf(theirs: Mapping[str, Any]) -> ModelConfig:
    """Our architecture for the config.json of a GPT-2; keys that it leaves out have transformers' defaults.

    Raises UserError naming a key whose value we do not compute.
    """
    for key, wanted in _GPT2_ONLY.items():
        if theirs.get(key, wanted) != wanted:
            raise UserError(f"config.json has {key}={theirs[key]!r}, wanted {wanted!r}; this model cannot be converted")
    activation = theirs.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise UserError(f"config.json has activation_function={activation!r}, wanted one of {', '.join(_ACTIVATIONS)}")
    return ModelConfig(
        n_layers=theirs.get("n_layer", 12),
        d_model=theirs.get("n_embd", 768),
        n_heads=theirs.get("n_head", 12),
        d_ff=theirs.get("n_inner"),
        seq_len=theirs.get("n_positions", 1024),
        vocab_size=theirs.get("vocab_size", 50257),
        activation=_ACTIVATIONS[activation],
        tied_embeddings=theirs.get("tie_word_embeddings", True),
        dropout_embedding=theirs.get("embd_pdrop", 0.1),
        dropout_attention=theirs.get("attn_pdrop", 0.1),
        dropout_residual=theirs.get("resid_pdrop", 0.1),
        norm_eps=theirs.get("layer_norm_epsilon", 1e-5),
        init_std=theirs.get("initializer_range", 0.02),
    )


def load_logical(
    parameters: Iterable[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor], *, whole_model: bool = True
) -> None:
    """Copy into each parameter its own part of the logical tensor of that name; padding keeps its zeros.

    parameters: canonical names and parameters, as `GPT.named_parameters()`. Dtypes and devices may differ.
    whole_model: False for the parameters of one pipeline stage: tensors that they do not need are then right.
    Raises UserError, before anything is copied, naming what is missing, unexpected, or of another shape.
    """
    wanted = dict(parameters)
    if missing := wanted.keys() - tensors.keys():
        raise UserError(f"no tensor for {_few(missing)}; the weights are those of another architecture")
    if whole_model and (unexpected := tensors.keys() - wanted.keys()):
        raise UserError(f"the model has no {_few(unexpected)}; the weights are those of another architecture")
    for name, parameter in wanted.items():
        _require_shape(name, tensors[name], part_of(parameter).shape)
    with torch.no_grad():
        for name, parameter in wanted.items():
            part = part_of(parameter)
            part.unpadded(parameter).copy_(part.take(tensors[name]))


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read and converted when it is asked for."""

    shape: tuple[int, ...]
    get: Callable[[], Tensor]


@dataclass(frozen=True)
class Change:
    """How a tensor differs between theirs and ours; the two functions are exact inverses."""

    to_ours: Callable[[Tensor, ModelConfig], Tensor]
    to_theirs: Callable[[Tensor, ModelConfig], Tensor]


@dataclass(frozen=True)
class Rule:
    """One tensor, or one per block ("{}" is its number). shape: the one of theirs."""

    ours: str
    theirs: str
    shape: Callable[[ModelConfig], tuple[int, ...]]
    change: Change


def _rows_by_head(x: Tensor, config: ModelConfig) -> Tensor:
    """[q of all heads | k | v] → per head [q, k, v]."""
    return x.unflatten(0, (3, config.n_heads, config.head_width)).transpose(0, 1).flatten(0, 2)


def _rows_by_kind(x: Tensor, config: ModelConfig) -> Tensor:
    """Per head [q, k, v] → [q of all heads | k | v]."""
    return x.unflatten(0, (config.n_heads, 3, config.head_width)).transpose(0, 1).flatten(0, 2)


SAME = Change(lambda x, c: x, lambda x, c: x)
CONV1D = Change(lambda x, c: x.t().contiguous(), lambda x, c: x.t().contiguous())  # their y = x W, ours y = x Wᵀ
QKV = Change(_rows_by_head, _rows_by_kind)
QKV_CONV1D = Change(
    lambda x, c: _rows_by_head(x.t(), c).contiguous(), lambda x, c: _rows_by_kind(x, c).t().contiguous()
)

GPT2 = (
    Rule("embedding.tokens.weight", "transformer.wte.weight", lambda c: (c.vocab, c.d_model), SAME),
    Rule("embedding.positions", "transformer.wpe.weight", lambda c: (c.seq_len, c.d_model), SAME),
    Rule("blocks.{}.norm_1.weight", "transformer.h.{}.ln_1.weight", lambda c: (c.d_model,), SAME),
    Rule("blocks.{}.norm_1.bias", "transformer.h.{}.ln_1.bias", lambda c: (c.d_model,), SAME),
    Rule(
        "blocks.{}.attention.qkv.weight",
        "transformer.h.{}.attn.c_attn.weight",
        lambda c: (c.d_model, 3 * c.d_model),
        QKV_CONV1D,
    ),
    Rule("blocks.{}.attention.qkv.bias", "transformer.h.{}.attn.c_attn.bias", lambda c: (3 * c.d_model,), QKV),
    Rule(
        "blocks.{}.attention.out.weight",
        "transformer.h.{}.attn.c_proj.weight",
        lambda c: (c.d_model, c.d_model),
        CONV1D,
    ),
    Rule("blocks.{}.attention.out.bias", "transformer.h.{}.attn.c_proj.bias", lambda c: (c.d_model,), SAME),
    Rule("blocks.{}.norm_2.weight", "transformer.h.{}.ln_2.weight", lambda c: (c.d_model,), SAME),
    Rule("blocks.{}.norm_2.bias", "transformer.h.{}.ln_2.bias", lambda c: (c.d_model,), SAME),
    Rule(
        "blocks.{}.mlp.up.weight",
        "transformer.h.{}.mlp.c_fc.weight",
        lambda c: (c.d_model, c.ff_width),
        CONV1D,
    ),
    Rule("blocks.{}.mlp.up.bias", "transformer.h.{}.mlp.c_fc.bias", lambda c: (c.ff_width,), SAME),
    Rule(
        "blocks.{}.mlp.down.weight",
        "transformer.h.{}.mlp.c_proj.weight",
        lambda c: (c.ff_width, c.d_model),
        CONV1D,
    ),
    Rule("blocks.{}.mlp.down.bias", "transformer.h.{}.mlp.c_proj.bias", lambda c: (c.d_model,), SAME),
    Rule("head.norm.weight", "transformer.ln_f.weight", lambda c: (c.d_model,), SAME),
    Rule("head.norm.bias", "transformer.ln_f.bias", lambda c: (c.d_model,), SAME),
    Rule("head.tokens.weight", "lm_head.weight", lambda c: (c.vocab, c.d_model), SAME),  # where not tied
)

_GPT2_ROOTS = ("transformer.", "lm_head.")
_GPT2_MASKS = re.compile(r"\.attn\.(bias|masked_bias)$")
_GPT2_ONLY = {  # keys that change what is computed, at the one value that we compute
    "model_type": "gpt2",
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_ACTIVATIONS: dict[str, Literal["gelu_tanh", "gelu"]] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu": "gelu",
}


def _expand(table: Iterable[Rule], config: ModelConfig) -> Iterator[tuple[Rule, int]]:
    for rule in table:
        if rule.ours == "head.tokens.weight" and config.tied_embeddings:
            continue
        for i in range(config.n_layers if "{}" in rule.ours else 1):
            yield rule, i


def _require_equal(head: Tensor, embedding: Tensor) -> None:
    if not torch.equal(head, embedding):
        raise UserError("lm_head.weight differs from wte.weight, but the model ties them; use tied_embeddings=False")


def _require_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise UserError(f"{name} has shape {tuple(tensor.shape)}, wanted {shape}; check the model configuration")


def _few(names: Iterable[str]) -> str:
    """The first names, for a message of one line."""
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
