"""Readers of input: JSON lines, plain text files, folders of them, standard input; each plain or packed.

The reading process only cuts the input into blocks of whole lines; workers parse them (`texts`). Memory is
bounded by the block size and by the longest document allowed, whatever a file unpacks to.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from megagpt.data.text.first_look import JSON_SUFFIXES, Format, damaged, find_key, look
from megagpt.data.text.packed import DAMAGED, STANDARD_INPUT, chunks, without_packing
from megagpt.errors import UserError
from megagpt.files import os_reason

BLOCK_BYTES = 1 << 20
Tell = Callable[[UserError], None]
"""What is told of input that is left out."""
_BOM = b"\xef\xbb\xbf"
_STRING_OR_BRACKET = re.compile(rb'("(?:[^"\\]++|\\.)*+")([ \t\r]*+:)?|[{}\[\]]')
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_. -]+")
_ESCAPED_ASCII = re.compile(rb"\\u00[2-7]")


@dataclass(frozen=True)
class InputFile:
    """A file to read, and how. number: its place in the input, from 0."""

    path: Path
    is_json: bool
    number: int = 0

    def __str__(self) -> str:
        return "standard input" if self.path == STANDARD_INPUT else str(self.path)

    @property
    def n_bytes(self) -> int:
        """As stored; 0 for standard input."""
        return 0 if self.path == STANDARD_INPUT else self.path.stat().st_size


@dataclass(frozen=True)
class Block:
    """Whole lines of a JSON lines file, or the whole of a text file."""

    file: InputFile
    first_line: int
    """Line number of the first line, counted from 1."""
    data: bytes
    stored_bytes: int
    """Bytes of the file, as stored, that were read for this block: for progress."""
    ends_file: bool = False
    """Whether it is the last of its file."""


def find_inputs(
    inputs: Sequence[str | Path],
    input_format: Format = "auto",
    keys: Sequence[str] = ("text",),
    tell: Tell | None = None,
) -> list[InputFile]:
    """The files behind the arguments, in order; a folder stands for its files by path, less hidden ones.

    A name that ends in .jsonl, .json or .ndjson (before .gz or the like) is JSON lines, as is standard input (`-`); all
    else is plain text. The first bytes of each are looked at, so that what cannot be read is told before the work.
    tell: told of a file that is empty, damaged or of a format that is not read, which is then left out.

    **Raises** `UserError` for what is missing, unreadable, no regular file or folder, or contradicts its name.
    """
    files: list[InputFile] = []
    bad: list[UserError] = []
    for item in map(Path, inputs):
        if item == STANDARD_INPUT:
            files.append(InputFile(item, input_format != "text", len(files)))
            continue
        found = _walk(item) if _mode(item, stat.S_ISDIR) else [item]
        if not found:
            raise UserError(f"{item}: the folder has no files; give a folder with text or JSON lines in it")
        for path in found:
            if not _mode(path, stat.S_ISREG):
                raise UserError(f"{path}: neither a regular file nor a folder; pipe the data in with --input -")
            is_json = input_format == "jsonl" or (input_format == "auto" and _named_json(path))
            if wrong := look(path, is_json, input_format, keys, lines_may_be_bad=tell is not None):
                if tell is None or wrong.asks:
                    bad.append(wrong.error)
                else:
                    tell(wrong.error)
            else:
                files.append(InputFile(path, is_json, len(files)))
    if bad:
        raise UserError(
            f"{bad[0]}" + (f" (and {len(bad) - 1} more files are not as they should be)" if bad[1:] else "")
        )
    if [file.path for file in files].count(STANDARD_INPUT) > 1:
        raise UserError("--input names standard input (-) twice; name it once")
    return files


def read_blocks(files: Sequence[InputFile], max_document_bytes: int, tell: Tell | None = None) -> Iterator[Block]:
    """Cut files into blocks, in order.

    tell: told of what is left out: a line that is too long, the rest of a damaged file; without it, that is an error.

    **Raises** `UserError` for a line or text beyond max_document_bytes, an empty or a damaged file.
    """
    for file in files:
        cut = _line_blocks if file.is_json else _text_block
        try:
            yield from cut(file, max_document_bytes, tell)
        except UserError as error:
            if tell is None:
                raise
            tell(error)


def texts(block: Block, keys: Sequence[str], tell: Tell | None = None) -> Iterator[tuple[str, ...]]:
    """The documents of a block: for each, the text under every key (for a plain text file: its text).

    keys: `a.b` is the key b of the object under a, where there is no key of that name itself.
    tell: told of each line or file that is left out for being no document; without it, the first one is an error.

    **Raises** `UserError` naming file, line and key for whatever is not a document.
    """
    for number, line in _lines(block):
        try:
            if block.file.is_json:
                document = _record_texts(f"{block.file}: line {number}", line, keys)
            else:
                document = (_plain_text(block),) * len(keys)
        except UserError as error:
            if tell is None:
                raise
            tell(error)
        else:
            yield document


def _lines(block: Block) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, numbered; a text file is one. Where files were joined, their marks are inside."""
    if not block.file.is_json:
        yield 1, block.data
        return
    for number, line in enumerate(block.data.split(b"\n"), block.first_line):
        if line and not line.isspace():
            line = line.removeprefix(_BOM)
            if line and not line.isspace():
                yield number, line


def _record_texts(where: str, line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise UserError(f"{where}: {_explain(line, error)}; mend or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f'{where}: got a {type(record).__name__}, wanted an object such as {{"text": "…"}}')
    values = []
    for key in keys:
        path, value = find_key(record, key)
        if path is None:
            raise UserError(f"{where}: no key {key!r}, it has {_shorten(list(record))}; name the key with --json-keys")
        if not isinstance(value, str):
            raise UserError(f"{where}: key {key!r} holds {_shorten(value)}, wanted a string; see --json-keys")
        if _may_repeat(line, path) and _repeats(line, path):
            raise UserError(f"{where}: key {key!r} appears twice; keep one")
        values.append(value)
    return tuple(values)


def _may_repeat(line: bytes, path: tuple[str, ...]) -> bool:
    """A quick look: false for nearly all lines. A key may be spelt with escapes the second time."""
    for key in path:
        escapes = _ESCAPED_ASCII.search(line) if _PLAIN_KEY.fullmatch(key) else b"\\" in line
        if escapes or line.count(b'"%b"' % key.encode()) > 1:
            return True
    return False


def _repeats(line: bytes, path: tuple[str, ...]) -> bool:
    """Whether a key on the way to a value is there twice, in JSON that is whole. Not recursive, as `json` is."""
    seen: set[tuple[str, ...]] = set()
    inside: list[str] = []  # the key of each bracket that is open; the outermost has none, nor have those in lists
    key = ""
    for match in _STRING_OR_BRACKET.finditer(line):
        string, colon = match.groups()
        if string is None:
            if match[0] in b"{[":
                inside.append(key)
            else:
                inside.pop()
            key = ""
        elif colon:
            key = orjson.loads(string)
            here = (*inside[1:], key)
            if here == path[: len(here)]:
                if here in seen:
                    return True
                seen.add(here)
    return False


def _plain_text(block: Block) -> str:
    try:
        text = block.data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{block.file}: byte {error.start}: not UTF-8; convert it (iconv -t UTF-8)") from None
    if (at := block.data.find(b"\x00")) >= 0:
        raise UserError(f"{block.file}: byte {at}: NUL, so not UTF-8 text; leave it out or convert it")
    return text


def _line_blocks(file: InputFile, limit: int, tell: Tell | None) -> Iterator[Block]:
    parts: list[bytes] = []
    size, line, is_empty, drops = 0, 1, True, False
    stored = stored_before = 0
    try:
        for chunk, stored in _chunks(file):
            is_empty = False
            if drops:  # the rest of a line that is too long
                _, newline, chunk = chunk.partition(b"\n")
                if not newline:
                    continue
                line, drops = line + 1, False
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
                data = b"".join(parts)
                whole = data[: data.rfind(b"\n") + 1]
                line += whole.count(b"\n")
                error = _too_long(f"{file}: line {line}", limit)
                if tell is None:
                    raise error
                tell(error)
                yield Block(file, line - whole.count(b"\n"), whole, 0)
                parts, size, drops = [], 0, True
    except UserError:  # damaged: what was read of it counts where it is left out
        data = b"".join(parts)
        yield Block(file, line, data[: data.rfind(b"\n") + 1], stored - stored_before)
        raise
    if is_empty:
        raise UserError(f"{file}: empty; leave it out, or fetch it again")
    yield Block(file, line, b"".join(parts), stored - stored_before, ends_file=True)


def _text_block(file: InputFile, limit: int, _tell: Tell | None) -> Iterator[Block]:
    parts: list[bytes] = []
    size = stored_bytes = 0
    for chunk, stored_bytes in _chunks(file):  # noqa: B007  # the last one counts
        parts.append(chunk)
        size += len(chunk)
        if size > limit:
            raise _too_long(str(file), limit)
    yield Block(file, 1, b"".join(parts).removeprefix(_BOM), stored_bytes, ends_file=True)


def _chunks(file: InputFile) -> Iterator[tuple[bytes, int]]:
    """`chunks`, whose errors are those of users."""
    try:
        yield from chunks(file.path, BLOCK_BYTES)
    except DAMAGED as error:
        raise damaged(str(file), error) from None
    except OSError as error:
        if error.errno is None:
            raise damaged(str(file), error) from None
        raise UserError(f"{file}: cannot be read ({os_reason(error)}); check the file") from None


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


def _named_json(path: Path) -> bool:
    return without_packing(path).suffix.lower() in JSON_SUFFIXES


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
