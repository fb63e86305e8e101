"""What one architecture of transformers is made of, and the keys of config.json that several of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from megagpt.errors import UserError
from megagpt.hf.layouts import QKV
from megagpt.ops.rotary import ntk_base

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


def rotary_of(keys: Keys, base_key: str = "rope_theta") -> dict[str, Any]:
    """Base, factor and scaling, from rope_theta and rope_scaling, or from rope_parameters (transformers 5).

    Raises UserError for a scaling that is not linear.
    """
    given = keys.get("rope_scaling") or keys.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, Mapping) for value in given.values()):
        raise UserError(f"config.json has rotary parameters {given!r}, wanted one set for all layers")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind not in ("default", "linear"):
        raise UserError(f"config.json has rope_type={kind!r}, wanted 'default' or 'linear'; it cannot be converted")
    base, factor = given.get("rope_theta", keys.get(base_key, 10000.0)), given.get("factor", 1.0)
    for key, value in ((base_key, base), ("factor", factor)):
        if not isinstance(value, int | float):
            raise UserError(f"config.json has {key}={value!r}, wanted a number")
    return {
        "position": "rotary",
        "rotary_base": float(base),
        "rotary_factor": float(factor) if kind == "linear" else 1.0,
        "rotary_scaling": "linear",
    }


def rotary_keys(config: ModelConfig, base_key: str = "rope_theta") -> dict[str, Any]:
    """The same keys as transformers 4 wrote them, which 5 reads too."""
    base, factor = rotary_of_ours(config)
    scaling = None if factor == 1.0 else {"type": "linear", "rope_type": "linear", "factor": factor}
    return {base_key: base, "rope_scaling": scaling}


def rotary_of_ours(config: ModelConfig) -> tuple[float, float]:
    """Base and linear factor. NTK-aware scaling is another base, and is written as such."""
    if config.rotary_scaling == "linear":
        return config.rotary_base, config.rotary_factor
    return ntk_base(config.rotary_base, config.rotary_factor, config.rotary_width), 1.0


def share(part: int, whole: int) -> float:
    """The fraction with int(whole * fraction) == part."""
    fraction = part / whole
    return fraction if int(whole * fraction) == part else math.nextafter(fraction, 2.0)


def head_width(d_model: int, n_heads: int) -> int:
    """d_model / n_heads.  Raises UserError unless they divide."""
    if n_heads < 1 or d_model < 1 or d_model % n_heads:
        raise UserError(f"config.json has {n_heads} heads and a width of {d_model}, wanted heads that divide it")
    return d_model // n_heads


def require_only(keys: Keys, only: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    """Raises UserError naming a key whose value we do not compute. where: what the key's name begins with."""
    for key, allowed in only.items():
        if (value := keys.get(key, allowed[0])) not in allowed:
            wanted = " or ".join(map(repr, allowed))
            raise UserError(f"config.json has {where}{key}={value!r}, wanted {wanted}; this model cannot be converted")
