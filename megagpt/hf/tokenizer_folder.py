"""The tokenizer of a Hugging Face folder: which of the files that lie there make it, and what comes with it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megagpt.config import DataConfig
from megagpt.data.tokenizers.files import other_kind, parse_json_object, read_tokenizer_file
from megagpt.data.tokenizers.gpt2 import END_OF_TEXT, missing_byte
from megagpt.data.tokenizers.hf import HfTokenizer, token_name
from megagpt.data.tokenizers.same import same_ids
from megagpt.data.tokenizers.tokenizer import KINDS, Bounds, Tokenizer
from megagpt.errors import UserError

SETTINGS, _SPECIAL, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
CHAT_TEMPLATE = "chat_template.jinja"
_IDS = "generation_config.json"  # where transformers keeps which ids begin and end a text
_BEGINS = "add_bos_token"  # of the settings: whether a text begins with a token of its own
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The classes of transformers that do with the files of a kind just what we do.
_CLASSES = {"gpt2": ("GPT2Tokenizer", "GPT2TokenizerFast"), "sentencepiece": ("LlamaTokenizer", "LlamaTokenizerFast")}
_REMEDY = (
    "let transformers write a complete tokenizer.json there (AutoTokenizer.from_pretrained, save_pretrained) and "
    "import again, or name the tokenizer by --tokenizer and its files when you train"
)


def find_tokenizer(source: Path) -> tuple[Tokenizer | None, str | None]:
    """The tokenizer of a folder, or why there is none although there are files; (None, None) where there are none.

    tokenizer.json says all of it. The files that it was made from serve in its place, being faster, where they give the
    same ids and it adds none at the ends of a text; and alone where nothing beside them says more.
    Raises UserError for a file that is damaged.
    """
    there = [kind for kind in ("hf", *_CLASSES) if all(path.exists() for path in _files(source, kind))]
    if not there:
        return None, None
    found = _whole(source, there[1:]) if there[0] == "hf" else _in_parts(source, there[0])
    return found if isinstance(found, tuple) else (found, None)


def copy_tokenizer(source: Path, tokenizer: Tokenizer, copy: Path, final: Path) -> DataConfig:
    """Copy what makes a tokenizer, and how to name it once `copy` is called `final`. With it go the special ids."""
    copy.mkdir()
    for path in (*tokenizer.files, *(source / name for name in (SETTINGS, _SPECIAL, CHAT_TEMPLATE))):
        if path.exists():
            shutil.copyfile(path, copy / path.name)
    (copy / _IDS).write_text(json.dumps(_ids_in(source / "config.json") | _ids_in(source / _IDS)), encoding="utf-8")
    keys = {"model": "tokenizer_model"}
    named = {keys.get(option.key, option.key): str(final / option.name) for option in tokenizer.options}
    return DataConfig(tokenizer=tokenizer.kind, **named)  # pyright: ignore[reportArgumentType]  # a kind that it knows


def special_ids(tokenizer: Tokenizer | None) -> dict[str, Any]:
    """For config.json: the ids that an imported tokenizer came with; else, as in GPT-2, one that begins and ends."""
    end = tokenizer.eod if tokenizer else None
    ids: dict[str, Any] = {"bos_token_id": end, "eos_token_id": end}
    if tokenizer is None or not tokenizer.files:
        return ids
    begin = token_name(tokenizer.transformers_settings.get("bos_token"))
    if begin is not None and isinstance(tokenizer, HfTokenizer):
        ids["bos_token_id"] = tokenizer.id_of(begin)
    return ids | _ids_in(tokenizer.files[0].with_name(_IDS))


def bounds_of(tokenizer: Tokenizer | None, folder: Path) -> Bounds:
    """What transformers puts before a text and takes for its end, by a folder of theirs or of an import's tokenizer."""
    ids = _ids_in(folder / "config.json") | _ids_in(folder / _IDS)
    named = ids.get("eos_token_id")
    ends = {*(named if isinstance(named, list) else [named]), tokenizer.eod if tokenizer else None}
    begin = _begin(tokenizer, folder, ids.get("bos_token_id")) if tokenizer else ()
    return Bounds(begin, tuple(sorted(i for i in ends if isinstance(i, int))))


def _begin(tokenizer: Tokenizer, folder: Path, bos: Any) -> tuple[int, ...]:
    """By the settings, else by the template of tokenizer.json."""
    settings = settings_in(folder)
    begins = settings.get(_BEGINS)
    if begins is None and isinstance(tokenizer, HfTokenizer):
        return tokenizer.begin
    name = token_name(settings.get("bos_token"))
    if name is not None and isinstance(tokenizer, HfTokenizer):
        bos = tokenizer.id_of(name)
    return (bos,) if begins and isinstance(bos, int) else ()


def _files(source: Path, kind: str) -> list[Path]:
    return [source / option.name for option in KINDS[kind].options]


def _whole(source: Path, others: Sequence[str]) -> Tokenizer | tuple[None, str]:
    whole = HfTokenizer(*_files(source, "hf"))
    for token, i in _added(source):
        if whole.id_of(token) != i:
            return None, f"{source}: tokenizer.json has no {token!r} of id {i}, which files beside it add; {_REMEDY}"
    for token in _named(source):
        if whole.id_of(token) is None:
            return None, f"{source}: tokenizer.json has no {token!r}, which files beside it name; {_REMEDY}"
    for kind in () if whole.has_template else others:
        with contextlib.suppress(UserError):  # of another kind or damaged: it is not needed
            if same_ids(plain := KINDS[kind](*_files(source, kind)), whole):
                return plain
    return whole


def _in_parts(source: Path, kind: str) -> Tokenizer | tuple[None, str]:
    """The tokenizer of files that say only a part of it, unless something says that there is more."""
    first = _files(source, kind)[0]
    data = read_tokenizer_file(first)
    what = other_kind(kind, data)
    if kind == "gpt2" and missing_byte(parse_json_object(first, data)):
        what = "not of byte-level BPE, as GPT-2's is"
    if what:
        return None, f"{first} is {what}; {_REMEDY}"
    tokenizer, settings = KINDS[kind](*_files(source, kind)), settings_in(source)
    reader = settings.get("tokenizer_class", _CLASSES[kind][0])
    more = [f"{SETTINGS} names the class {reader}"] if reader not in _CLASSES[kind] else []
    more += [f"{token!r} is added to it" for token, i in _added(source) if i >= tokenizer.vocab_size]
    if kind == "gpt2":
        more += [f"{token!r} is added to it" for token, i in _added(source) if tokenizer.encode(token) != [i]]
        more += [f"{token!r} is a special token" for token in _named(source) if token != END_OF_TEXT]
        more += ["add_prefix_space is set"] if settings.get("add_prefix_space") else []
    return (None, f"{first} is not the whole tokenizer: {more[0]}; {_REMEDY}") if more else tokenizer


def _added(source: Path) -> Iterator[tuple[str, int]]:
    """(token, id) of what the files beside a vocabulary add to it."""
    yield from ((token, i) for token, i in _object(source / _ADDED).items() if isinstance(i, int))
    decoder = settings_in(source).get("added_tokens_decoder")
    for i, token in decoder.items() if isinstance(decoder, dict) else ():
        if (name := token_name(token)) is not None and i.isdecimal():
            yield name, int(i)


def _named(source: Path) -> Iterator[str]:
    """The special tokens that the files beside a vocabulary name, each of which is one token to transformers.

    Without that for padding: no text has it.
    """
    settings = settings_in(source)
    others = [settings.get("additional_special_tokens"), settings.get("extra_special_tokens")]
    tokens = [settings.get(name) for name in ("bos_token", "eos_token", "unk_token")]
    for more in others:
        tokens += more if isinstance(more, list) else more.values() if isinstance(more, dict) else []
    yield from (name for token in tokens if (name := token_name(token)) is not None)


def settings_in(source: Path) -> dict[str, Any]:
    """What files beside a tokenizer say of it; empty where there are none."""
    return _object(source / _SPECIAL) | _object(source / SETTINGS)


def _ids_in(path: Path) -> dict[str, Any]:
    return {key: value for key, value in _object(path).items() if key in _ID_KEYS and value is not None}


def _object(path: Path) -> dict[str, Any]:
    return parse_json_object(path, read_tokenizer_file(path)) if path.exists() else {}
