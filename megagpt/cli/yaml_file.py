"""YAML files of a run: read strictly, one line naming file and key for what is wrong; and written."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError, create_model
from yaml.composer import Composer

from megagpt.cli.translate import Advice, advise, plain_name
from megagpt.config import SECTIONS, RunConfig, plain
from megagpt.config.values import MAX_DATASETS, DataPath
from megagpt.errors import UserError
from megagpt.files import os_reason

Values = dict[str, dict[str, Any]]  # section -> key -> value: the part of a RunConfig that somebody set


def read_config(values: Mapping[str, Any], where: str) -> RunConfig:
    """A RunConfig from plain nested data, such as the configuration that a checkpoint carries.

    where: what an error message names. Raises: UserError for unknown keys, wrong types and refused values.
    """
    return merged([(where, check_values(values, where))])


def merged(sources: Sequence[tuple[str, Values]]) -> RunConfig:
    """A RunConfig of the defaults with each source over the ones before; its checks run once all are there.

    sources: (what an error message names, its values).
    Raises: UserError, naming the source that set last what the failing check is about.
    """
    sections = {}
    for name, section in get_type_hints(RunConfig).items():
        keys = {key: value for _, values in sources for key, value in values.get(name, {}).items()}
        try:
            sections[name] = section(**keys)
        except UserError as error:
            about = error.keys or [f"{name}.{key}" for key in keys]
            setters = (where for where, values in reversed(sources) if not _sets_none(values, about))
            error.where = next(setters, "")
            raise
    return RunConfig(**sections)


def _sets_none(values: Values, keys: Iterable[str]) -> bool:
    """Whether a source sets none of these keys."""
    return not any(key in values.get(section, {}) for section, key in (name.split(".") for name in keys))


def read_yaml(path: Path) -> Values:
    """What a YAML file sets, types checked. Raises: UserError, one line with the file and the place."""
    try:
        values = _Loader(_read(path).decode("utf-8-sig")).get_single_data()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)}); check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None
    except yaml.MarkedYAMLError as error:
        place = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{place}: {error.problem}; mend the YAML") from None
    except (yaml.YAMLError, ValueError) as error:  # unprintable characters; a date or an int out of range
        raise UserError(f"{path}: {str(error).splitlines()[0]}; mend the YAML") from None
    except RecursionError:
        raise UserError(f"{path}: is nested too deep; a run has sections with keys, no more") from None
    return check_values({} if values is None else values, str(path))


def _read(path: Path) -> bytes:
    with open(path, "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UserError(f"{path}: has more than {_MAX_BYTES >> 20} MB, so it is no configuration; check the path")
    return data


def to_yaml(config: RunConfig) -> str:
    """The whole resolved configuration as YAML, which `--config` reads back to an equal object."""
    return yaml.dump(plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=False, width=1000)


def check_values(values: Any, where: str, names: Mapping[str, str] = MappingProxyType({})) -> Values:
    """The same nested data, unknown keys and wrong types refused. Ranges are the dataclasses' business.

    names: how a message calls a key, where not by itself.
    """
    try:
        return _partial_model().model_validate(values).model_dump(exclude_unset=True)
    except ValidationError as error:
        found = error.errors(include_url=False)
    unknown = [(".".join(map(str, e["loc"][:2])), e["input"]) for e in found if e["type"] == "extra_forbidden"]
    if unknown:
        raise _unknown_keys(unknown, values, where)
    said = [(".".join(map(str, first["loc"][:2])), *_wrong_type(first, names)) for first in found]
    (key, got, wanted), *others = said
    lines = [f"  {got} {wanted}" for _, got, wanted in others[:_SHOWN]]
    raise UserError(got, wanted, keys=[key], where=where, lines=lines)


_SHOWN = 100  # of what is wrong with a file


def _wrong_type(error: Any, names: Mapping[str, str]) -> tuple[str, str]:
    """What was got, and what was wanted."""
    key, wanted = ".".join(map(str, error["loc"][:2])), error["msg"].removeprefix("Input should be ")
    if error["type"].startswith("bool"):
        wanted += " (true or false)"
    if error["type"] == "model_type":
        wanted = "keys with values" if key else f"sections ({', '.join(SECTIONS)})"
    return f"{names.get(key, key) + ': ' if key else ''}got {reprlib.repr(error['input'])},", f"wanted {wanted}"


def _unknown_keys(unknown: list[tuple[str, Any]], values: Any, where: str) -> UserError:
    """What is said of all keys that are not ours: what they are here, as far as we know."""
    keys = [key for key, _ in unknown]
    given = {plain_name(key): text for key, text in _flat(values)}
    leaves = list(
        itertools.islice(((name, text) for key, value in unknown for name, text in _flat(value, key)), _SHOWN)
    )
    known = dotted_keys()
    said = []
    for name, text in leaves:
        advice = advise(name, text, given, known)
        said.append((name, _written(advice), advice.note))
    if len(said) == 1:
        ((name, here, note),) = said
        what = f"here it is {here}" + (f" ({note})" if note else "") if here else note
        return UserError(f"unknown key {name}; {what or 'see --help for what there is'}", keys=keys, where=where)
    lines = [f"  {name}: {here + (f' ({note})' if note and here else note) or 'unknown'}" for name, here, note in said]
    lines += [f"  and {len(keys) - _SHOWN:,} more"] if len(keys) > _SHOWN else []
    text = f"{len(keys):,} keys are unknown; beneath, what each is here (--help has ours)"
    return UserError(text, keys=keys, where=where, lines=lines)


def _written(advice: Advice) -> str:
    """As it stands in a file: `model.n_layers: 24`."""
    words = {"True": "true", "False": "false"}
    return ", ".join(f"{key}: {words.get(value, value)}" for key, value in advice.settings.items())


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, value as text) of all leaves of nested mappings."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    else:
        yield name, " ".join(map(str, value)) if isinstance(value, list) else str(value)


def dotted_keys() -> list[str]:
    """Every setting: model.n_layers, …"""
    default = RunConfig()
    return [f"{name}.{f.name}" for name in SECTIONS for f in dataclasses.fields(getattr(default, name))]


@functools.cache
def _partial_model() -> type[BaseModel]:
    """RunConfig's keys and types for pydantic, every one optional, without the dataclasses' own checks."""
    strict = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    sections: dict[str, Any] = {}
    for name, section in get_type_hints(RunConfig).items():
        hints = get_type_hints(section)
        keys: dict[str, Any] = {f.name: (_from_yaml(hints[f.name]), None) for f in dataclasses.fields(section)}
        sections[name] = (create_model(section.__name__, __config__=strict, **keys), None)
    return create_model("RunConfig", __config__=strict, **sections)


def _from_yaml(hint: Any) -> Any:
    """What stands in a file for a field of this type: text for what is parsed later, words for several of it."""
    if is_words(hint):
        words = _as_texts if hint == tuple[str, ...] else _as_words
        return Annotated[tuple[str, ...], Strict(False), BeforeValidator(words)]
    return str if hasattr(hint, "parse") else hint


def is_words(hint: Any) -> bool:
    """Whether a field of this type takes several words."""
    return hint is DataPath or get_origin(hint) is tuple


def _as_words(value: Any) -> Any:
    """`0.7 A 0.3 B`, or the list [0.7, A, 0.3, B], as the words that the command line would have given."""
    if isinstance(value, str):
        return value.split()
    if isinstance(value, list):
        return [str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for v in value]
    return value


def _as_texts(value: Any) -> Any:
    """A text with spaces is one text."""
    return [value] if isinstance(value, str) else value


_MAX_BYTES = 4 << 20
_MAX_KEYS = 1000  # of one mapping
_MAX_NODES = 2 * MAX_DATASETS + _MAX_KEYS  # the longest that a file may hold is a blend, weights and prefixes


class _Loader(Composer, yaml.CSafeLoader):
    """Plain data only. Keys are words and stand once; no aliases, which a small file can blow up with; no tags.

    What a plain word is follows YAML 1.2 (`_PLAIN`), and so `yes` is a word. Files are read no further than a
    configuration can go. Events come from libyaml: PyYAML's own take 8 s for what are 4 MB of words.
    """

    def __init__(self, text: str) -> None:
        self.n_nodes = 0
        yaml.CSafeLoader.__init__(self, text)
        Composer.__init__(self)

    def compose_node(self, parent, index):
        event: Any = self.peek_event()
        self.n_nodes += 1
        if self.check_event(yaml.AliasEvent):
            raise _refusal("aliases are not supported", event)
        if event.tag is not None:
            raise _refusal(f"tags such as {event.tag} are not supported", event)
        if self.n_nodes > _MAX_NODES:
            raise _refusal(f"more than {_MAX_NODES:,} values, so it is no configuration", event)
        if isinstance(parent, yaml.MappingNode) and index is None and len(parent.value) >= _MAX_KEYS:
            raise _refusal(f"more than {_MAX_KEYS:,} keys in one place; a run has sections with keys, no more", event)
        return super().compose_node(parent, index)

    def construct_object(self, node, deep=False):
        value = super().construct_object(node, deep)
        if isinstance(value, int) and abs(value) >= 2**63:
            raise _refusal("an integer of more than 64 bits", node)
        if isinstance(value, str) and not _is_text(value):
            raise _refusal("a word with a NUL or half a surrogate pair in it", node)
        return value

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if not isinstance(key, str) or key in seen:
                raise _refusal(
                    f"key {key} is there twice" if isinstance(key, str) else "a key must be a word", key_node
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _refusal(what: str, where: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, what, where.start_mark)


def _is_text(value: str) -> bool:
    """Whether a path can be so: no NUL, no surrogates but those of os.fsdecode, for bytes that are not UTF-8."""
    return not any(c == "\0" or "\ud800" <= c < "\udc80" or "\udcff" < c <= "\udfff" for c in value)


class _Dumper(yaml.SafeDumper):
    """Quotes a word that YAML 1.1 or 1.2 would take for something else: others read these files too."""


# The core schema of YAML 1.2 (section 10.3.2), but for leading zeros: 010 was 8 in YAML 1.1 and is 10 in 1.2. It stays
# a word, which no number setting takes.
_NUMBER = r"[-+]?(0|[1-9][0-9]*)"
_PLAIN = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (rf"{_NUMBER}|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        rf"({_NUMBER}(\.[0-9]*)?|[-+]?\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
}
_Loader.yaml_implicit_resolvers = {}  # without those of YAML 1.1
for _kind, (_form, _begins) in _PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_kind}", re.compile(rf"({_form})$"), [c.strip("\0") for c in _begins]
        )
