"""What the kinds of tokenizer share: reading their files, and checking the ids in them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megagpt.errors import UserError
from megagpt.files import os_reason, placeholder, require_regular

MAX_ID = 1 << 24  # 60 times the largest published vocabulary; tables of all ids stay below 100 MB
REDO = "fetch the tokenizer's files again"
_MAX_BYTES = 256 << 20  # the largest published file has 33 MB
_TIKTOKEN_LINE = re.compile(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n")


@dataclass(frozen=True)
class FileOption:
    """A file that a kind of tokenizer is built from.

    key: of the argument of `build_tokenizer`. flag: on the command line. name: that transformers gives such a file.
    """

    key: str
    flag: str
    name: str


def read_tokenizer_file(path: Path) -> bytes:
    """Contents of a tokenizer's file, or a `UserError` that names it."""
    try:
        require_regular(path)
        if (n_bytes := path.stat().st_size) > _MAX_BYTES:
            raise UserError(f"{path}: {n_bytes:,} bytes, a tokenizer's file has at most {_MAX_BYTES:,}; {REDO}")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)}); check the tokenizer's path") from None
    if not data:
        raise UserError(f"{path}: empty; {REDO}")
    if pointer := placeholder(data):
        raise UserError(f"{path}: {pointer}")
    return data


def other_kind(kind: str, data: bytes) -> str | None:
    """What a file is, and the remedy, where its first bytes are those of another kind of tokenizer."""
    if _TIKTOKEN_LINE.match(data):
        return "a tiktoken file; give the tokenizer.json that is published with the same model (--tokenizer hf)"
    if kind != "sentencepiece" and data.startswith(b"\x0a") and b"\x00" in data:  # protobuf: field 1 holds the pieces
        return "a SentencePiece model; give it with --tokenizer sentencepiece"
    if kind != "hf" and data.lstrip().startswith(b"{") and b'"added_tokens"' in data:
        return "a tokenizer.json; give it with --tokenizer hf"
    return None


def parse_json_object(path: Path, data: bytes) -> dict:
    """A JSON object in which no key appears twice, or a `UserError` that says where it breaks."""

    def unique(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) < len(pairs):
            keys = [key for key, _ in pairs]
            raise UserError(f"{path}: key {next(k for k in keys if keys.count(k) > 1)!r} appears twice; {REDO}")
        return result

    try:
        value = json.loads(data, object_pairs_hook=unique)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start}: not UTF-8; {REDO}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno}, column {error.colno}: {error.msg}; {REDO}") from None
    except (RecursionError, ValueError) as error:
        raise UserError(f"{path}: not usable as JSON ({error}); {REDO}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: got a {type(value).__name__}, wanted an object; {REDO}")
    return value


def check_ids(path: Path, entries: Iterable[tuple[str, object]]) -> int:
    """Check (token, id) pairs and return one more than the largest id.

    **Raises** `UserError` for an id that is no id, too large to store, or given to two tokens.
    """
    owner: dict[int, str] = {}
    for token, value in entries:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < MAX_ID:
            raise UserError(f"{path}: token {token!r} has id {value!r}, wanted 0 to {MAX_ID - 1}; {REDO}")
        if owner.setdefault(value, token) != token:
            raise UserError(f"{path}: id {value} belongs to {owner[value]!r} and to {token!r}; {REDO}")
    if not owner:
        raise UserError(f"{path}: has no tokens; {REDO}")
    return max(owner) + 1


def files_sha256(kind: str, contents: Iterable[bytes]) -> str:
    """SHA-256 over the kind and the files' contents: two tokenizers with the same one give the same ids."""
    digest = hashlib.sha256(kind.encode())
    for data in contents:
        digest.update(hashlib.sha256(data).digest())
    return digest.hexdigest()


def byte_alphabet() -> dict[str, int]:
    """Printable character in byte-level BPE files -> the byte that it stands for (Radford et al. 2019).

    Printable Latin-1 stands for itself; the 68 other bytes take the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}
