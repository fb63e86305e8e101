"""The side file `P.json`: which tokenizer made a dataset, its counts, and the hashes the format lacks."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megagpt.data.indexed.mmididx import open_for_reading
from megagpt.data.indexed.prefixes import require_dataset
from megagpt.errors import UserError

_OWN_HASH = "json_sha256"  # a key of the file: the hash of all its other values
_LATER = ("token_text_bytes", "unknown_tokens", "lost_share", "lost_characters")  # older files do not have these
_MAX_BYTES = 1 << 20
_WORTH_A_WORD = 0.001
_REMEDY = "run preprocess_data.py again, or delete the file and name the tokenizer"


@dataclass(frozen=True, kw_only=True)
class DatasetMeta:
    """What is known of an indexed dataset beyond its tokens."""

    tokenizer: str
    """Kind: gpt2, sentencepiece, hf or bytes."""
    tokenizer_files: tuple[str, ...]
    """Files that the tokenizer was built from, as absolute paths."""
    tokenizer_sha256: str
    """Hash over the contents of these files."""
    vocab_size: int
    eod: int | None
    """Id of the end-of-document token, None where the tokenizer has none."""
    append_eod: bool
    """Whether each document ends with `eod`."""
    documents: int
    tokens: int
    text_bytes: int
    """UTF-8 bytes of the text that was tokenized."""
    token_text_bytes: int | None = None
    """Those that the tokens stand for, token by token: the same, unless the tokenizer loses or changes text."""
    unknown_tokens: int | None = None
    """Tokens in place of text that the tokenizer does not know."""
    lost_share: float | None = None
    """Of the bytes of a sample of the text: those that decoding does not give back."""
    lost_characters: str | None = None
    """Which these are, the most frequent ones first."""
    idx_sha256: str = ""
    bin_sha256: str = ""


def meta_path(prefix: str | Path) -> Path:
    """The side file of a dataset prefix."""
    return Path(f"{prefix}.json")


def read_meta(prefix: str | Path) -> DatasetMeta | None:
    """Read `prefix.json`; None where there is none (a dataset that Megatron-LM wrote).

    **Raises** `UserError` when the file is there and is not, to the last value, what `meta_json` gave.
    """
    path = meta_path(prefix)
    if not os.path.lexists(path):
        return None
    require_dataset(prefix)  # a .json alone is another file, a text perhaps
    values = _read_object(path)
    types = {f.name: str(f.type) for f in fields(DatasetMeta)} | {_OWN_HASH: "str"}
    for name, wanted in types.items():
        if name in _LATER and name not in values:
            continue
        if name not in values or not _is_a(values[name], wanted):
            got = repr(values[name])[:60] if name in values else "missing"
            raise UserError(f"{path}: key {name!r} is {got}, wanted {wanted}; {_REMEDY}")
    if unknown := values.keys() - types.keys():
        raise UserError(f"{path}: unknown key {min(unknown)[:60]!r}; {_REMEDY}")
    recorded = values.pop(_OWN_HASH)
    if recorded != _own_hash(values):
        raise UserError(f"{path}: its values are not those of its own key {_OWN_HASH!r}, one was changed; {_REMEDY}")
    values["tokenizer_files"] = tuple(values["tokenizer_files"])
    return DatasetMeta(**values)


def meta_json(meta: DatasetMeta) -> str:
    """The text of the side file."""
    return json.dumps(asdict(meta) | {_OWN_HASH: _own_hash(asdict(meta))}, indent=2) + "\n"


def losses(meta: DatasetMeta | None) -> list[str]:
    """What the tokenizer did not keep of the text, in words; nothing where that is hardly anything, or not known."""
    found: list[str] = []
    if meta is None:
        return found
    if (share := (meta.unknown_tokens or 0) / max(1, meta.tokens)) >= _WORTH_A_WORD:
        found.append(f"{share:.1%} of the tokens stand for text that the tokenizer does not know")
    if meta.lost_share is not None and meta.lost_share >= _WORTH_A_WORD:
        found.append(
            f"about {meta.lost_share:.1%} of the text (by bytes, of a sample) does not come back from the tokens, "
            f"most of all {', '.join(map(repr, meta.lost_characters or ''))}"
        )
    return found


def _own_hash(values: dict) -> str:
    known = {field.name: values[field.name] for field in fields(DatasetMeta) if field.name in values}
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _read_object(path: Path) -> dict:
    with os.fdopen(open_for_reading(path), "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UserError(f"{path}: more than {_MAX_BYTES} bytes, so no side file of a dataset; {_REMEDY}")
    try:
        values = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start}: not UTF-8; {_REMEDY}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; {_REMEDY}") from None
    except (RecursionError, ValueError):  # an integer of thousands of digits is a ValueError
        raise UserError(f"{path}: not usable as JSON; {_REMEDY}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: got a {type(values).__name__}, wanted an object; {_REMEDY}")
    return values


def _is_a(value: object, annotation: str) -> bool:
    match annotation:
        case "int":
            return isinstance(value, int) and not isinstance(value, bool) and value >= 0
        case "int | None":
            return value is None or _is_a(value, "int")
        case "float | None":
            return value is None or _is_a(value, "int") or (isinstance(value, float) and value >= 0)
        case "str | None":
            return value is None or isinstance(value, str)
        case "bool":
            return isinstance(value, bool)
        case "tuple[str, ...]":
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        case _:
            return isinstance(value, str)
