"""config.json, both ways, and which architecture of transformers computes what ours does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from megagpt.config import ModelConfig, plain
from megagpt.errors import UserError
from megagpt.hf.architecture import ANY, Architecture, Keys, require_only, rotary_of_ours
from megagpt.hf.architectures import ARCHITECTURES
from megagpt.inventory.layers import norm
from megagpt.model.mlp import MLPS
from megagpt.model.position import POSITIONS

_NOT_COMPUTED = {"dropout_embedding", "dropout_attention", "dropout_residual", "init", "init_std"}


def hf_config(config: ModelConfig, architecture: str | None = None) -> dict[str, Any]:
    """The config.json of a model with this architecture; bos and eos ids are the caller's to add.

    architecture: a model_type; None takes the first that fits. Dropout that it has no key for is left out: what a
    trained model computes does not depend on it.
    Raises UserError where it does not fit, naming what hinders, or where none does, naming the nearest.
    """
    found = architecture_of(config, architecture)
    return {
        "model_type": found.name,
        "architectures": [found.model_class],
        **found.to_keys(config),
        "bos_token_id": None,
        "eos_token_id": None,
    }


def config_from_hf(theirs: Keys) -> ModelConfig:
    """Our architecture for a config.json, by its model_type; keys that it leaves out have transformers' defaults.

    Raises UserError naming a key whose value we do not compute.
    """
    architecture = named(theirs.get("model_type"))
    keys: dict[str, Any] = {}
    for key, value in theirs.items():
        name = architecture.aliases.get(key, key)
        if keys.setdefault(name, value) != value:
            raise UserError(f"config.json has {name}={keys[name]!r} and {key}={value!r}, wanted one of them")
    require_only(keys, ANY)
    require_only(keys, architecture.only)
    try:
        config = architecture.from_keys(keys)
    except (TypeError, ValueError) as error:
        raise UserError(f"config.json has a value of another type than it should be ({error})") from None
    _require_types(config)
    return config


def named(name: object) -> Architecture:
    """The architecture of that model_type.  Raises UserError where there is none."""
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(f"got model_type={name!r}, wanted one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def architecture_of(config: ModelConfig, name: str | None = None) -> Architecture:
    """The one of that name, or the first that fits.  Raises UserError as hf_config."""
    if name is not None:
        found = named(name)
        if wrong := _hindrances(found, config):
            raise UserError(f"this architecture cannot be a {name} of transformers: {few(wrong)}")
        return found
    wrong = {found.name: _hindrances(found, config) for found in ARCHITECTURES.values()}
    nearest = min(wrong, key=lambda name: len(wrong[name]))
    if wrong[nearest]:
        raise UserError(f"transformers has no such architecture; the nearest is {nearest}: {few(wrong[nearest])}")
    return ARCHITECTURES[nearest]


def _hindrances(architecture: Architecture, config: ModelConfig) -> list[str]:
    """What does not come back when the configuration is written in their keys and read again."""
    ours = _computed(config)
    try:
        back = _computed(architecture.from_keys(architecture.to_keys(config)))
    except UserError as error:
        return [str(error)] * len(ours)  # nothing comes back
    differing = [name for name in ours if name in back and ours[name] != back[name]]
    return [f"it has model.{name}={back[name]}, not {ours[name]}" for name in differing]


def few(texts: Iterable[str]) -> str:
    """The first of them, each once, for a message of one line."""
    found = list(dict.fromkeys(texts))
    return ", ".join(found[:3]) + (f", and {len(found) - 3} more" if len(found) > 3 else "")


def _require_types(config: ModelConfig) -> None:
    """Raises UserError naming a field that config.json gave a text, or part of a number."""
    defaults, hints = plain(ModelConfig()), get_type_hints(ModelConfig)
    for name, value in plain(config).items():
        default, wanted = defaults[name], "a whole number"
        if isinstance(default, bool):
            ok, wanted = isinstance(value, bool), "true or false"
        elif float in (hints[name], *get_args(hints[name])):
            ok = (isinstance(value, int | float) and not isinstance(value, bool)) or (value is None and default is None)
            wanted = "a number"
        else:
            whole = isinstance(value, int) and not isinstance(value, bool)
            ok = whole or isinstance(default, str | list) or (value is None and default is None)
        if not ok:
            raise UserError(f"config.json has {name}={value!r}, wanted {wanted}")


def _computed(config: ModelConfig) -> dict[str, Any]:
    """All that what is computed depends on, defaults resolved.

    Left out are the settings of kinds of position and MLP that were not chosen.
    """
    fields: dict[str, Any] = {name: value for name, value in plain(config).items() if name not in _NOT_COMPUTED}
    fields |= {"n_kv_heads": config.kv_heads, "d_head": config.head_width, "d_ff": config.ff_width}
    fields["bias_norm"] = "bias" in norm(config)
    fields["attention"] = " ".join(_cycle([str(config.pattern(layer)) for layer in range(config.n_layers)]))
    chosen = {*POSITIONS[config.position].settings, *MLPS[config.mlp].settings}
    of_kinds = {setting for kind in (*POSITIONS.values(), *MLPS.values()) for setting in kind.settings}
    if "rotary_" in chosen:
        for name in [name for name in fields if name.startswith("rotary_")]:
            del fields[name]
        fields |= rotary_of_ours(config) | {"rotary_interleaved": config.rotary_interleaved}
        fields["rotary_fraction"] = config.rotary_width / config.head_width
    return {name: value for name, value in fields.items() if not name.startswith(tuple(of_kinds - chosen))}


def _cycle(patterns: list[str]) -> list[str]:
    """The shortest beginning that the layers go through in turn."""
    lengths = range(1, len(patterns) + 1)
    return patterns[: next(n for n in lengths if all(patterns[i] == patterns[i % n] for i in range(len(patterns))))]
