"""Readers of input: JSON lines, plain text files, folders of them, each plain, gzip or zstandard.

The reading process only cuts the input into blocks of whole lines; workers parse them (`texts`). Memory is
bounded by the block size and by the longest document allowed, whatever a file unpacks to.
"""

from __future__ import annotations

import gzip
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import orjson
import zstandard

from megagpt.errors import UserError
from megagpt.files import os_reason

BLOCK_BYTES = 1 << 20
JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
PACKED_SUFFIXES = (".gz", ".zst")
Format = Literal["auto", "jsonl", "text"]
_BOM = b"\xef\xbb\xbf"
_KEY_OR_BRACKET = re.compile(rb'("(?:[^"\\]++|\\.)*+")([ \t\r]*+:)?|[{}\[\]]')
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_. -]+")
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")


@dataclass(frozen=True)
class InputFile:
    """A file to read, and how."""

    path: Path
    is_json: bool


@dataclass(frozen=True)
class Block:
    """Whole lines of a JSON lines file, or the whole of a text file."""

    file: InputFile
    first_line: int
    """Line number of the first line, counted from 1."""
    data: bytes
    stored_bytes: int
    """Bytes of the file, as stored, that were read for this block: for progress."""


def find_inputs(inputs: Sequence[str | Path], input_format: Format = "auto") -> list[InputFile]:
    """The files behind the arguments, in order; a folder stands for its files by path, less hidden ones.

    A name that ends in .jsonl, .json or .ndjson (before .gz or .zst) is JSON lines; all else is plain text.

    **Raises** `UserError` for what is missing, unreadable, or neither a regular file nor a folder.
    """
    files: list[InputFile] = []
    for item in map(Path, inputs):
        found = _walk(item) if _mode(item, stat.S_ISDIR) else [item]
        if not found:
            raise UserError(f"{item}: the folder has no files; give a folder with text or JSON lines in it")
        for path in found:
            if not _mode(path, stat.S_ISREG):
                raise UserError(f"{path}: neither a regular file nor a folder; write the data to a file first")
            files.append(InputFile(path, _is_json(path, input_format)))
    return files


def read_blocks(files: Sequence[InputFile], max_document_bytes: int) -> Iterator[Block]:
    """Cut files into blocks, in order.

    **Raises** `UserError` for a line or text beyond max_document_bytes, an empty or a damaged file.
    """
    for file in files:
        cut = _line_blocks if file.is_json else _text_block
        try:
            yield from cut(file, max_document_bytes)
        except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{file.path}: damaged or cut off archive ({error}); fetch or pack it again") from None
        except OSError as error:
            raise UserError(f"{file.path}: cannot be read ({os_reason(error)}); check the file") from None


def texts(block: Block, keys: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The documents of a block: for each, the text under every key (for a plain text file: its text).

    **Raises** `UserError` naming file, line and key for whatever is not a document.
    """
    if not block.file.is_json:
        yield (_plain_text(block),) * len(keys)
        return
    for number, line in enumerate(block.data.split(b"\n"), block.first_line):
        if line and not line.isspace():
            yield _record_texts(f"{block.file.path}: line {number}", line, keys)


def _record_texts(where: str, line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: {_explain(line, error)}; mend or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f'{where}: got a {type(record).__name__}, wanted an object such as {{"text": "…"}}')
    values = []
    for key in keys:
        if key not in record:
            raise UserError(f"{where}: no key {key!r}, it has {_shorten(list(record))}; name the key with --json-keys")
        if not isinstance(record[key], str):
            raise UserError(f"{where}: key {key!r} holds {_shorten(record[key])}, wanted a string; see --json-keys")
        if _may_repeat(line, key) and _outermost_keys(line).count(key) > 1:
            raise UserError(f"{where}: key {key!r} appears twice; keep one")
        values.append(record[key])
    return tuple(values)


def _may_repeat(line: bytes, key: str) -> bool:
    """A quick look: false for nearly all lines. A key may be spelt with escapes the second time."""
    escapes = _ESCAPED_ASCII.search(line) if _PLAIN_KEY.fullmatch(key) else b"\\" in line
    return bool(escapes) or line.count(b'"%b"' % key.encode()) > 1


def _outermost_keys(line: bytes) -> list[str]:
    """The keys of an object that is known to be JSON, repeated ones too. Not recursive, as `json` is."""
    keys, depth = [], 0
    for match in _KEY_OR_BRACKET.finditer(line):
        string, colon = match.groups()
        if string is None:
            depth += 1 if match[0] in b"{[" else -1
        elif colon and depth == 1:
            keys.append(orjson.loads(string))
    return keys


def _plain_text(block: Block) -> str:
    try:
        text = block.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{block.file.path}: byte {error.start}: not UTF-8; convert it (iconv -t UTF-8)") from None
    if (at := block.data.find(b"\x00")) >= 0:
        raise UserError(f"{block.file.path}: byte {at}: NUL, so not UTF-8 text; leave it out or convert it")
    return text


def _line_blocks(file: InputFile, limit: int) -> Iterator[Block]:
    parts: list[bytes] = []
    size, line, is_empty = 0, 1, True
    stored = stored_before = 0
    for chunk, stored in _chunks(file.path):
        if is_empty:
            chunk, is_empty = chunk.removeprefix(_BOM), False
        cut = chunk.rfind(b"\n") + 1
        if cut and size + cut >= BLOCK_BYTES:
            data = b"".join([*parts, chunk[:cut]])
            yield Block(file, line, data, stored - stored_before)
            line, stored_before = line + data.count(b"\n"), stored
            parts, size = [], 0
            chunk = chunk[cut:]
        parts.append(chunk)
        size += len(chunk)
        if size > limit + BLOCK_BYTES:  # all but less than a block of it is one unfinished line
            number = line + sum(part.count(b"\n") for part in parts)
            raise _too_long(f"{file.path}: line {number}", limit)
    if is_empty:
        raise UserError(f"{file.path}: empty; leave it out, or fetch it again")
    yield Block(file, line, b"".join(parts), stored - stored_before)


def _text_block(file: InputFile, limit: int) -> Iterator[Block]:
    parts: list[bytes] = []
    size = 0
    for chunk, _ in _chunks(file.path):
        parts.append(chunk)
        size += len(chunk)
        if size > limit:
            raise _too_long(str(file.path), limit)
    yield Block(file, 1, b"".join(parts).removeprefix(_BOM), file.path.stat().st_size)


def _chunks(path: Path) -> Iterator[tuple[bytes, int]]:
    """Unpacked pieces of bounded size, each with the number of stored bytes read so far."""
    with open(path, "rb") as raw:
        if path.suffix == ".zst":
            for chunk in _unpack_zst(raw):
                yield chunk, raw.tell()
            return
        unpacked = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        while chunk := unpacked.read(BLOCK_BYTES):
            yield chunk, raw.tell()


def _unpack_zst(raw: BinaryIO) -> Iterator[bytes]:
    """Frame by frame: the library's stream reader ends without a word where a file was cut off.

    A zstandard block turns 4 bytes into at most 128 KiB, so that 4 KiB of input bound the output.
    """
    frame, is_open = zstandard.ZstdDecompressor().decompressobj(), False
    while piece := raw.read(4096):
        while piece:
            chunk, is_open = frame.decompress(piece), True
            piece = b""
            if frame.eof:
                piece, is_open = frame.unused_data, False
                frame = zstandard.ZstdDecompressor().decompressobj()
            for start in range(0, len(chunk), BLOCK_BYTES):
                yield chunk[start : start + BLOCK_BYTES]
    if is_open:
        raise EOFError("it ends within a frame")


def _walk(folder: Path) -> list[Path]:
    """Files under a folder, symbolic links to folders not followed: so that no loop can form."""
    found = []
    for parent, folders, names in os.walk(folder, onerror=_unreadable):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(found)


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}: cannot be read ({os_reason(error)}); check its permissions") from None


def _mode(path: Path, test: Callable[[int], bool]) -> bool:
    try:
        return test(path.stat().st_mode)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)}); check --input") from None


def _is_json(path: Path, input_format: Format) -> bool:
    if input_format == "auto":
        name = path.with_suffix("") if path.suffix in PACKED_SUFFIXES else path
        return name.suffix in JSON_SUFFIXES
    return input_format == "jsonl"


def _explain(line: bytes, error: orjson.JSONDecodeError) -> str:
    """What is wrong with a line, and at which of its bytes."""
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as bad:
        return f"byte {bad.start}: not UTF-8"
    return f"byte {len(error.doc[: error.pos].encode())}: not JSON ({error.msg})"


def _too_long(where: str, limit: int) -> UserError:
    return UserError(f"{where}: a document of more than {limit >> 20} MB; split it, or raise --max-document-mb")


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"
