"""The side file `P.json`: which tokenizer made a dataset, its counts, and the hashes the format lacks."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from megagpt.errors import UserError


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
    """UTF-8 bytes of the text that the tokens stand for."""
    idx_sha256: str = ""
    bin_sha256: str = ""


def meta_path(prefix: str | Path) -> Path:
    """The side file of a dataset prefix."""
    return Path(f"{prefix}.json")


def read_meta(prefix: str | Path) -> DatasetMeta | None:
    """Read `prefix.json`; None where there is none (a dataset that Megatron-LM wrote).

    **Raises** `UserError` when the file is there and is not what `write_meta` writes.
    """
    path = meta_path(prefix)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); delete it and name the tokenizer instead") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: got a {type(values).__name__}, wanted an object; delete it and name the tokenizer")
    for f in fields(DatasetMeta):
        if f.name not in values or not _is_a(values[f.name], str(f.type)):
            raise UserError(
                f"{path}: key {f.name!r} is {values.get(f.name, 'missing')!r}, wanted {f.type}; "
                "run preprocess_data.py again, or delete the file and name the tokenizer"
            )
    values["tokenizer_files"] = tuple(values["tokenizer_files"])
    return DatasetMeta(**{f.name: values[f.name] for f in fields(DatasetMeta)})


def meta_json(meta: DatasetMeta) -> str:
    """The text of the side file."""
    return json.dumps(asdict(meta), indent=2) + "\n"


def _is_a(value: object, annotation: str) -> bool:
    match annotation:
        case "int":
            return isinstance(value, int) and not isinstance(value, bool) and value >= 0
        case "int | None":
            return value is None or _is_a(value, "int")
        case "bool":
            return isinstance(value, bool)
        case "tuple[str, ...]":
            return isinstance(value, list) and all(isinstance(item, str) for item in value)
        case _:
            return isinstance(value, str)
