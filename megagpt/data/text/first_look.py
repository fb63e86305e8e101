"""What the first bytes of an input file tell, and its last line: before hours of work, and with the true cause."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import orjson

from megagpt.data.text.packed import DAMAGED, HEAD_BYTES, chunks, packing
from megagpt.errors import UserError
from megagpt.files import os_reason, placeholder

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
Format = Literal["auto", "jsonl", "text"]
_BOM = b"\xef\xbb\xbf"
_HEAD_BYTES = 1 << 16
_MOST_OF_A_LINE = 16 << 20
_TAIL_BYTES = 1 << 20
# (first bytes, at which of them, what it is, what to do)
_OTHER_FORMATS = (
    (b"PAR1", 0, "a Parquet file", "write its text column as JSON lines (DataFrame.to_json, lines=True)"),
    (b"ARROW1", 0, "an Arrow file", "write its text column as JSON lines (DataFrame.to_json, lines=True)"),
    (b"ustar", 257, "a tar archive", "unpack it, and give the folder"),
    (b"PK\x03\x04", 0, "a zip archive, which xlsx and docx are too", "unpack it, and give the text in it"),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", "unpack it, and give the folder"),
    (b"Rar!\x1a\x07", 0, "a RAR archive", "unpack it, and give the folder"),
    (b"\x04\x22\x4d\x18", 0, "packed by lz4", "unpack it (lz4 -d), or pipe it in: lz4 -dc FILE | … --input -"),
    (b"\x1f\x9d", 0, "packed by compress", "unpack it (gzip -d), or pipe it in: gzip -dc FILE | … --input -"),
    (b"LZIP\x01", 0, "packed by lzip", "unpack it (lzip -d), or pipe it in: lzip -dc FILE | … --input -"),
    (b"\x5d\x00\x00", 0, "packed by lzma", "unpack it (xz -d), or pipe it in: xz -dc FILE | … --input -"),
    (b"\xff\x06\x00\x00sNaPpY", 0, "packed by snappy", "unpack it"),
    (b"Obj\x01", 0, "an Avro file", "write its text column as JSON lines"),
    (b"%PDF-", 0, "a PDF", "extract its text first"),
    (b"\x89HDF", 0, "an HDF5 file", "write its text as JSON lines"),
    (b"SQLite format 3\x00", 0, "an SQLite database", "write its text as JSON lines"),
    (b"\x93NUMPY", 0, "a NumPy array", "give the text that it was made from"),
    (b"MMIDIDX\x00\x00", 0, "the index of a tokenized dataset", "train on it: --data-path with its name less .idx"),
    (b"\xff\xfe", 0, "byte 0: UTF-16, wanted UTF-8", "convert it: iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", 0, "byte 0: UTF-16, wanted UTF-8", "convert it: iconv -f UTF-16 -t UTF-8"),
)  # fmt: skip


@dataclass(frozen=True)
class Wrong:
    """Why a file is not read. asks: the answer is the user's, so that it is not left out with the bad ones."""

    error: UserError
    asks: bool = False


def look(
    path: Path, is_json: bool, input_format: Format, keys: Sequence[str], *, lines_may_be_bad: bool = False
) -> Wrong | None:
    """What hinders the reading of a file, as far as its first bytes and its last line say; None for nothing.

    keys: under which JSON lines hold text. lines_may_be_bad: the last line need not be whole.
    **Raises** `UserError` for a file that cannot be opened.
    """
    try:
        pieces = chunks(path, _HEAD_BYTES)
        head, _ = next(pieces, (b"", 0))
        if what := _foreign(head):
            return Wrong(UserError(f"{path}: {what}"))
        head = head.removeprefix(_BOM)
        if is_json:
            return _wrong_json(path, head, lines_may_be_bad)
        if input_format == "auto" and head.lstrip().startswith((b"{", b"[")):
            return _json_after_all(path, _first_line(head, pieces), keys)
    except DAMAGED as error:
        return Wrong(damaged(str(path), error))
    except OSError as error:
        if error.errno is None:
            return Wrong(damaged(str(path), error))
        raise UserError(f"{path}: cannot be read ({os_reason(error)}); check its permissions") from None
    return None


def damaged(name: str, error: Exception) -> UserError:
    """The error for an archive that cannot be unpacked."""
    if isinstance(error, MemoryError) or "memory" in str(error):
        return UserError(
            f"{name}: unpacking it needs more memory than there is ({error}); pack it again, without --long"
        )
    return UserError(f"{name}: damaged or cut off archive ({error}); fetch or pack it again")


def _first_line(head: bytes, pieces: Iterator[tuple[bytes, int]]) -> bytes:
    """The text up to the end of its first line at least, unless that is very long."""
    text = head.lstrip()
    while b"\n" not in text and len(text) < _MOST_OF_A_LINE and (piece := next(pieces, None)):
        text += piece[0]
    return text


def _json_after_all(path: Path, text: bytes, keys: Sequence[str]) -> Wrong | None:
    """Whether a file that is not named so holds JSON: objects on lines, with the key or several, a list, one object."""
    records = [_parsed(line) for line in text.split(b"\n", 2)[:2]]
    has_key = any(find_key(records[0], key)[0] for key in keys) if isinstance(records[0], dict) else False
    names = b"|".join(re.escape(key.encode()) for key in keys)
    if has_key or (len(records) == 2 and all(isinstance(record, dict) for record in records)):
        found = "its first line is a JSON object"
        remedy = "give --input-format jsonl, or text to train on it as it stands, braces and all"
    elif re.match(rb'\[\s*\{\s*"|\{\s*"(?:%b)"\s*:' % names, text):
        found = "it holds JSON over several lines"
        remedy = "convert it to an object a line (jq -c), or --input-format text trains on it as it stands"
    else:
        return None
    return Wrong(UserError(f"{path}: {found}, and its name is not one of JSON lines; {remedy}"), asks=True)


def _parsed(line: bytes) -> object:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return None


def find_key(record: dict, key: str) -> tuple[tuple[str, ...] | None, object]:
    """The keys that lead to a value, and the value: (key,), or for `a.b` those of nested objects; None for none."""
    if key in record:
        return (key,), record[key]
    value: object = record
    path = tuple(key.split("."))
    for part in path:
        if not isinstance(value, dict) or part not in value:
            return None, None
        value = value[part]
    return path, value


def _foreign(head: bytes) -> str | None:
    if pointer := placeholder(head):
        return pointer
    found = (f"{what}; {remedy}" for first, at, what, remedy in _OTHER_FORMATS if head[at : at + len(first)] == first)
    return next(found, None)


def _wrong_json(path: Path, head: bytes, lines_may_be_bad: bool) -> Wrong | None:
    if not head:
        return Wrong(UserError(f"{path}: empty; leave it out, or fetch it again"))
    line, newline, _ = head.lstrip().partition(b"\n")
    line = line.strip()
    number = 1 + head[: len(head) - len(head.lstrip())].count(b"\n")
    wrong = f"{path}: line {number}: "
    if line.startswith(b"["):
        wrong += "got a list, wanted an object on each line; convert it: jq -c '.[]' IN > OUT.jsonl"
    elif newline and line.startswith(b"{") and line.endswith((b",", b"{", b"[")):
        wrong += "an object over several lines, wanted one on each; convert it: jq -c . IN > OUT.jsonl"
    elif line.lower().startswith((b"<!doctype html", b"<html")):
        wrong += "a web page, so not the data; check where it was fetched from"
    elif not lines_may_be_bad and (last := _cut_line(path)) is not None:
        wrong = (
            f"{path}: its last line, from byte {last} on, is cut; fetch it again, or --on-bad-line skip leaves it out"
        )
    else:
        return None
    return Wrong(UserError(wrong))


def _cut_line(path: Path) -> int | None:
    """Where the last line begins, if that is within reach and no object ends with it; None for a packed file too."""
    with open(path, "rb") as file:
        if packing(file.read(HEAD_BYTES)):
            return None
        size = file.seek(0, 2)
        start = file.seek(max(0, size - _TAIL_BYTES))
        _, newline, line = file.read().rpartition(b"\n")
    begins = line.removeprefix(_BOM).lstrip().startswith(b"{") and (newline or not start)
    return size - len(line) if begins and not line.rstrip(b" \t\r\x00").endswith(b"}") else None
