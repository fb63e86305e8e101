"""What one architecture of transformers is made of, and the keys of config.json that several of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megagpt.errors import UserError
from megagpt.hf.layouts import QKV
from megagpt.model.position.rotary import NTK, scaling_of, yarn_magnitude

if TYPE_CHECKING:
    from megagpt.config import ModelConfig

Keys = Mapping[str, Any]
"""The contents of a config.json."""

Activation = Literal["gelu_tanh", "gelu", "relu", "relu2", "swiglu", "geglu"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One table: which module of ours is which of theirs, and how the configurations translate.

    name: its model_type.  model_class: the class of transformers that has its language-model head.
    modules: our module, "{}" for the number of the block, → theirs; several where they keep apart what we keep in one.
    to_keys: our architecture → config.json. It need not fit: `config.py` reads the keys back and compares.
    from_keys: config.json → our architecture; a missing key has transformers' default.
    only: keys that change what is computed → the values that we compute. A missing key means the first one.
    root: prefix of all names but the head's, that files of a model without its head lack.
    renamed: beginnings of names in other versions of transformers → those written here.
    aliases: other spellings of a key.
    """

    name: str
    model_class: str
    modules: Callable[[ModelConfig], Mapping[str, str | tuple[str, ...]]]
    to_keys: Callable[[ModelConfig], dict[str, Any]]
    from_keys: Callable[[Keys], ModelConfig]
    qkv: QKV
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    root: str = "transformer."
    renamed: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    transposed: bool = False
    """Matrices of blocks are (inputs, outputs): y = x W, where ours is y = x Wᵀ."""


ANY = {
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
    "pruned_heads": ({}, None),
    "quantization_config": (None,),
    "layer_types": (None,),
    "attention_chunk_size": (None,),
    "transformers_weights": (None,),  # the name of another file of weights
}
"""As Architecture.only, of every architecture."""

_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
}
_GATES: dict[str, Activation] = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu"}


def activation_of(keys: Keys, key: str, default: str, gated: bool = False) -> Activation:
    """Ours for the value of that key.  Raises UserError where we have none."""
    known, value = _GATES if gated else _ACTIVATIONS, keys.get(key, default)
    if value not in known:
        raise UserError(f"config.json has {key}={value!r}, wanted one of {', '.join(known)}")
    return known[value]


def activation_key(activation: str, gated: bool = False) -> str:
    """Theirs for ours; any one where there is none."""
    known = _GATES if gated else _ACTIVATIONS
    return next((theirs for theirs, ours in known.items() if ours == activation), next(iter(known)))


def rotary_of(keys: Keys, seq_len: int, base_key: str = "rope_theta", is_partial: bool = False) -> dict[str, Any]:
    """Context and rotary fields, from rope_theta and rope_scaling, or from rope_parameters (transformers 5).

    seq_len: where max_position_embeddings is missing. is_partial: the architecture turns a part of each head.
    Raises UserError for a kind of scaling that we do not compute.
    """
    given = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise UserError(f"config.json has rotary parameters {given!r}, wanted one set for all layers")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in _SCALINGS:
        wanted = " or ".join(map(repr, _SCALINGS))
        raise UserError(f"config.json has rope_type={kind!r}, wanted {wanted}; it cannot be converted")
    require_only(given, {} if is_partial else {"partial_rotary_factor": (1.0, None)}, "rope_parameters.")
    seq_len = _whole({"max_position_embeddings": seq_len, **keys}, "max_position_embeddings")
    base = given.get("rope_theta")
    base = _number({base_key: keys.get(base_key, 10000.0) if base is None else base}, base_key)
    ours = {"seq_len": seq_len, "position": "rotary", "rotary_base": base}
    return {**ours, **_SCALINGS[kind](given, seq_len, keys.get("original_max_position_embeddings"))}


def rotary_keys(config: ModelConfig, base_key: str = "rope_theta") -> dict[str, Any]:
    """The same keys as transformers 4 wrote them, which 5 reads too."""
    found = rotary_of_ours(config)
    kind, factor, original = found["rotary_scaling"], found["rotary_factor"], found.get("rotary_original_len")
    scaling = {"type": kind, "rope_type": kind, "factor": factor}
    if kind == "yarn":
        scaling |= {"attention_factor": found["rotary_attention_factor"], "original_max_position_embeddings": original}
        scaling |= {"beta_fast": found["rotary_beta_fast"], "beta_slow": found["rotary_beta_slow"]}
        scaling |= {} if found["rotary_truncate"] else {"truncate": False}
    if kind == "llama3":
        scaling |= {"low_freq_factor": found["rotary_low_freq_factor"], "original_max_position_embeddings": original}
        scaling |= {"high_freq_factor": found["rotary_high_freq_factor"]}
    return {
        "max_position_embeddings": original if kind == "dynamic" else config.seq_len,
        base_key: found["rotary_base"],
        "rope_scaling": None if kind == "linear" and factor == 1.0 else scaling,
    }


def rotary_of_ours(config: ModelConfig) -> dict[str, Any]:
    """The fields that rotary angles follow from, defaults resolved; NTK-aware scaling as the base that it is."""
    scaling = scaling_of(config)
    if isinstance(scaling, NTK):
        return {"rotary_base": scaling.base, "rotary_factor": 1.0, "rotary_scaling": "linear"}
    found = {name: getattr(config, name) for name in ("rotary_base", "rotary_factor", "rotary_scaling")}
    resolved = {"rotary_original_len": scaling.original_len, "rotary_attention_factor": scaling.magnitude}
    return found | {name: resolved.get(name, getattr(config, name)) for name in scaling.settings}


def _plain_scaling(given: Keys, seq_len: int, original: Any) -> dict[str, Any]:
    return {"rotary_factor": 1.0, "rotary_scaling": "linear"}


def _linear_scaling(given: Keys, seq_len: int, original: Any) -> dict[str, Any]:
    return {"rotary_factor": _number(given, "factor"), "rotary_scaling": "linear"}


def _dynamic_scaling(given: Keys, seq_len: int, original: Any) -> dict[str, Any]:
    """Here max_position_embeddings is what was trained with, and the context is longer by the factor."""
    factor = _number(given, "factor")
    reach = {"seq_len": int(seq_len * factor), "rotary_original_len": seq_len}
    return {"rotary_factor": factor, "rotary_scaling": "dynamic", **reach}


def _yarn_scaling(given: Keys, seq_len: int, original: Any) -> dict[str, Any]:
    require_only(given, {"truncate": (True, False)}, "rope_scaling.")
    original = _original(given, seq_len, original)
    factor = seq_len / original if given.get("factor") is None else _number(given, "factor")
    scales = [_number(given, name) if given.get(name) else None for name in ("mscale", "mscale_all_dim")]
    if given.get("attention_factor") is not None:
        magnitude = _number(given, "attention_factor")
    elif scales[0] and scales[1]:
        magnitude = yarn_magnitude(factor, scales[0]) / yarn_magnitude(factor, scales[1])
    else:
        magnitude = yarn_magnitude(factor)
    return {
        "rotary_factor": factor,
        "rotary_scaling": "yarn",
        "rotary_original_len": original,
        "rotary_truncate": bool(given.get("truncate", True)),
        "rotary_attention_factor": magnitude,
        "rotary_beta_fast": _number(given, "beta_fast") if given.get("beta_fast") else 32.0,
        "rotary_beta_slow": _number(given, "beta_slow") if given.get("beta_slow") else 1.0,
    }


def _llama3_scaling(given: Keys, seq_len: int, original: Any) -> dict[str, Any]:
    return {
        "rotary_factor": _number(given, "factor"),
        "rotary_scaling": "llama3",
        "rotary_original_len": _original(given, seq_len, original),
        "rotary_low_freq_factor": _number(given, "low_freq_factor"),
        "rotary_high_freq_factor": _number(given, "high_freq_factor"),
    }


_SCALINGS: dict[str, Callable[[Keys, int, Any], dict[str, Any]]] = {
    "default": _plain_scaling,
    "linear": _linear_scaling,
    "dynamic": _dynamic_scaling,
    "yarn": _yarn_scaling,
    "llama3": _llama3_scaling,
}
"""By rope_type: (its keys, max_position_embeddings, original_max_position_embeddings beside them) → our fields."""


def _original(given: Keys, seq_len: int, beside: Any) -> int:
    key = "original_max_position_embeddings"
    return _whole({key: given.get(key, seq_len) if beside is None else beside}, key)


def _number(keys: Keys, key: str) -> float:
    value = keys.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise UserError(f"config.json has {key}={value!r}, wanted a number")
    return float(value)


def _whole(keys: Keys, key: str) -> int:
    value = keys.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"config.json has {key}={value!r}, wanted a whole number above 0")
    return value


def share(part: int, whole: int) -> float:
    """The fraction with int(whole * fraction) == part."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 2.0)


def head_width(d_model: int, n_heads: int) -> int:
    """d_model / n_heads.  Raises UserError unless they divide."""
    if n_heads < 1 or d_model < 1 or d_model % n_heads:
        raise UserError(f"config.json has {n_heads} heads and a width of {d_model}, wanted heads that divide it")
    return d_model // n_heads


def require_head_dim(keys: Keys, d_model: int, n_heads: int) -> None:
    """Raises UserError where head_dim says otherwise: transformers turns by it, and does all else by the quotient."""
    require_only(keys, {"head_dim": (None, head_width(d_model, n_heads))})


def require_only(keys: Keys, only: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    """Raises UserError naming a key whose value we do not compute. where: what the key's name begins with."""
    for key, allowed in only.items():
        if (value := keys.get(key, allowed[0])) not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise UserError(f"config.json has {where}{key}={value!r}, wanted {wanted}; this model cannot be converted")
