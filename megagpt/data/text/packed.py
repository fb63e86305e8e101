"""Files as they are stored: plain, or packed by gzip, bzip2, xz or zstandard, as their first bytes say."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import zstandard

STANDARD_INPUT = Path("-")
_NAMES = {".gz": "gzip", ".gzip": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstandard", ".zstd": "zstandard"}
_FIRST_BYTES = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\x00", "zstandard": b"\x28\xb5\x2f\xfd"}
HEAD_BYTES = 8
_MAX_WINDOW = 1 << 31  # what `zstd --long=31` packs with: the library's own limit is 128 MiB

DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What unpacking raises for an archive that is damaged or cut; and OSError without a number (gzip, bzip2)."""


def without_packing(path: Path) -> Path:
    """The name of what is packed: a.jsonl of a.jsonl.gz."""
    return path.with_suffix("") if path.suffix.lower() in _NAMES else path


def chunks(path: Path, n_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Unpacked pieces of at most n_bytes, each with the number of stored bytes read so far. `-`: standard input.

    Raises DAMAGED or OSError.
    """
    with _opened(path) as file:
        source = _Source(file)
        how = packing(source.head)
        if how is None and (named := _NAMES.get(path.suffix.lower())):
            raise EOFError(f"its name says {named}, its first bytes do not")
        for chunk in _UNPACK[how](io.BufferedReader(source), n_bytes):
            yield chunk, source.n_bytes


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path == STANDARD_INPUT:
        yield sys.stdin.buffer
    else:
        with open(path, "rb") as file:
            yield file


class _Source(io.RawIOBase):
    """A file whose first bytes can be looked at, although it may be a pipe; counts what is read of it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.head = self._pending = file.read(HEAD_BYTES)
        self.n_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # any writable buffer
        data = self._pending[: len(buffer)] or self._file.read(len(buffer))
        self._pending = self._pending[len(buffer) :]
        buffer[: len(data)] = data
        self.n_bytes += len(data)
        return len(data)


def packing(head: bytes) -> str | None:
    """What packed a file, by its first HEAD_BYTES; None for nothing."""
    if head[1:4] == b"\x2a\x4d\x18" and head[0] & 0xF0 == 0x50:
        return "zstandard"  # a frame that is to be skipped, which pzstd writes first
    return next((name for name, first in _FIRST_BYTES.items() if head.startswith(first)), None)


def _read(opened: BinaryIO, n_bytes: int) -> Iterator[bytes]:
    while chunk := opened.read(n_bytes):
        yield chunk


def _read_unpacked(opened: gzip.GzipFile | bz2.BZ2File | lzma.LZMAFile, n_bytes: int) -> Iterator[bytes]:
    """A piece at a time, so that what comes before a damage is given before it is raised."""
    while chunk := opened.read1(n_bytes):
        yield chunk


def _zstandard(raw: BinaryIO, n_bytes: int) -> Iterator[bytes]:
    """Frame by frame: the library's stream reader ends without a word where a file was cut off.

    A zstandard block turns 4 bytes into at most 128 KiB, so that 4 KiB of input bound the output; beside it lies the
    window, which is as large as whoever packed the file wished.
    """

    def begin() -> zstandard.ZstdDecompressionObj:
        return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW).decompressobj()

    frame, is_open = begin(), False
    while piece := raw.read(4096):
        while piece:
            chunk, is_open = frame.decompress(piece), True
            piece = b""
            if frame.eof:
                piece, is_open = frame.unused_data, False
                frame = begin()
            for start in range(0, len(chunk), n_bytes):
                yield chunk[start : start + n_bytes]
    if is_open:
        raise EOFError("it ends within a frame")


_UNPACK: dict[str | None, Callable[[BinaryIO, int], Iterator[bytes]]] = {
    None: _read,
    "gzip": lambda raw, n_bytes: _read_unpacked(gzip.GzipFile(fileobj=raw), n_bytes),  # type: ignore[arg-type]
    "bzip2": lambda raw, n_bytes: _read_unpacked(bz2.BZ2File(raw), n_bytes),
    "xz": lambda raw, n_bytes: _read_unpacked(lzma.LZMAFile(raw), n_bytes),  # noqa: SIM115
    "zstandard": _zstandard,
}
