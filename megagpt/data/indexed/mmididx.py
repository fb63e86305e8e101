"""The `.idx` file of Megatron's indexed dataset: its layout, and the checks before any of it is believed.

Little-endian, unpadded: magic 9 B · version u64 · dtype code u8 · S u64 · D u64 · lengths int32[S] ·
byte offsets into `.bin` int64[S] · document boundaries int64[D]. See docs/data-format.md.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megagpt.errors import UserError
from megagpt.files import os_reason, placeholder

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # 34 bytes
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}
CHUNK = 1 << 20  # items handled at a time where memory must not grow with the dataset
REDO = "run preprocess_data.py again"


def dtype_for(vocab_size: int) -> np.dtype:
    """Token dtype by Megatron's rule: uint16 below 65500 ids, else int32."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


@dataclass(frozen=True)
class Index:
    """The contents of an `.idx`. **Shapes**: lengths int32[S], pointers int64[S], boundaries int64[D]."""

    dtype: np.dtype
    lengths: np.ndarray
    pointers: np.ndarray
    boundaries: np.ndarray
    sha256: str
    """Of the file: of the very bytes that the arrays were read from, in one reading."""


def read_index(path: Path, bin_path: Path, bin_size: int) -> Index:
    """An `.idx` in which every value has been checked.

    **Raises** `UserError` naming the file and the byte.
    """
    fd = open_for_reading(path)
    digest = hashlib.sha256()
    with os.fdopen(fd, "rb") as file:
        size = os.fstat(fd).st_size
        header = file.read(HEADER.size)
        dtype, n_sequences, n_boundaries = _check_header(path, header, size)
        digest.update(header)
        lengths = _read_array(path, file, "<i4", n_sequences, digest.update)
        pointers = _read_array(path, file, "<i8", n_sequences, digest.update)
        boundaries = _read_array(path, file, "<i8", n_boundaries, digest.update)
    _check_lengths(path, lengths)
    n_bytes = int(lengths.sum(dtype=np.int64)) * dtype.itemsize
    wanted = (np.cumsum(lengths, dtype=np.int64) - lengths) * dtype.itemsize
    _refuse(
        path, HEADER.size + 4 * n_sequences, 8, pointers != wanted,
        lambda i: f"sequence {i} points to byte {pointers[i]} of the .bin, its lengths say {wanted[i]}",
    )  # fmt: skip
    if n_bytes != bin_size:
        what = "too short" if bin_size < n_bytes else "too long"
        raise UserError(
            f"{bin_path}: {what}, it has {bin_size} bytes and {path} describes {n_bytes}; "
            f"restore the .bin that belongs to this .idx, or {REDO}"
        )
    _check_boundaries(path, HEADER.size + 12 * n_sequences, boundaries, n_sequences)
    return Index(dtype, lengths, pointers, boundaries, digest.hexdigest())


def complete_index(file: BinaryIO, n_sequences: int, empty_at: np.ndarray, dtype: np.dtype) -> None:
    """Add offsets, boundaries and header to a file that holds a gap of `HEADER.size` bytes and the lengths.

    A document is one sequence, or none: empty_at holds, ascending, the sequences before each empty document.
    A chunk at a time, so that memory does not grow with the dataset.
    """
    n_bytes = 0
    for start in range(0, n_sequences, CHUNK):
        count = min(CHUNK, n_sequences - start)
        file.seek(HEADER.size + 4 * start)
        lengths = np.frombuffer(file.read(4 * count), "<i4")
        ends = n_bytes + np.cumsum(lengths, dtype="<i8") * dtype.itemsize
        file.seek(HEADER.size + 4 * n_sequences + 8 * start)
        file.write((ends - lengths * np.int64(dtype.itemsize)).data)
        n_bytes = int(ends[-1])
    file.seek(HEADER.size + 12 * n_sequences)
    for start in range(0, n_sequences + 1, CHUNK):
        boundaries = np.arange(start, min(start + CHUNK, n_sequences + 1), dtype="<i8")
        repeated = empty_at[np.searchsorted(empty_at, start) : np.searchsorted(empty_at, start + CHUNK)]
        file.write(np.sort(np.concatenate([boundaries, repeated])).data)
    file.seek(0)
    file.write(HEADER.pack(MAGIC, 1, CODES[dtype], n_sequences, n_sequences + 1 + len(empty_at)))


def _read_array(
    path: Path, file: BinaryIO, dtype: str, count: int, hash_it: Callable[[memoryview], object]
) -> np.ndarray:
    array = np.fromfile(file, dtype, count)
    if len(array) < count:
        raise UserError(f"{path}: ends at byte {file.tell()}, cut while it was read; {REDO}")
    hash_it(array.data)
    return array


def _check_header(path: Path, header: bytes, size: int) -> tuple[np.dtype, int, int]:
    if len(header) < HEADER.size:
        raise UserError(f"{path}: has {size} bytes, an index has at least {HEADER.size}; {REDO}")
    magic, version, code, n_sequences, n_boundaries = HEADER.unpack(header)
    if pointer := placeholder(header):
        raise UserError(f"{path}: {pointer}")
    if magic != MAGIC:
        raise UserError(f"{path}: byte 0: begins {magic!r}, wanted {MAGIC!r}; check the path, or {REDO}")
    if version != 1:
        raise UserError(f"{path}: byte 9: version {version}, wanted 1; {REDO}")
    if code not in DTYPES:
        raise UserError(f"{path}: byte 17: dtype code {code}, wanted one of {sorted(DTYPES)}; {REDO}")
    if (
        n_sequences > size
        or n_boundaries > size
        or (wanted := HEADER.size + 12 * n_sequences + 8 * n_boundaries) > size
    ):
        raise UserError(
            f"{path}: byte 18: announces {n_sequences} sequences and {n_boundaries} document boundaries, "
            f"more than its {size} bytes hold; {REDO}"
        )
    if wanted < size:
        modes = (
            ": sequence modes of a multimodal dataset, which a GPT cannot use" if size - wanted == n_sequences else ""
        )
        raise UserError(f"{path}: byte {wanted}: {size - wanted} bytes too many{modes}; {REDO}")
    return np.dtype(DTYPES[code]), n_sequences, n_boundaries


def _check_lengths(path: Path, lengths: np.ndarray) -> None:
    _refuse(path, HEADER.size, 4, lengths < 0, lambda i: f"sequence {i} has the negative length {lengths[i]}")


def _check_boundaries(path: Path, at: int, boundaries: np.ndarray, n_sequences: int) -> None:
    if len(boundaries) == 0 or boundaries[0] != 0 or boundaries[-1] != n_sequences:
        got = f"{boundaries[0]} to {boundaries[-1]}" if len(boundaries) else "nothing"
        raise UserError(f"{path}: byte {at}: document boundaries run from {got}, wanted 0 to {n_sequences}; {REDO}")
    _refuse(
        path, at + 8, 8, np.diff(boundaries) < 0,
        lambda i: f"document boundary {i + 1} is {boundaries[i + 1]}, below the one before, {boundaries[i]}",
    )  # fmt: skip


def _refuse(path: Path, at: int, item_size: int, wrong: np.ndarray, say: Callable[[int], str]) -> None:
    """Raise for the first true entry of wrong; entry i lies at byte `at + i * item_size`."""
    if wrong.any():
        i = int(wrong.argmax())
        raise UserError(f"{path}: byte {at + i * item_size}: {say(i)}; {REDO}")


def open_for_reading(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO must not hang the open
    except FileNotFoundError:
        raise UserError(f"{path}: not there; check the path") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)}); check the path and its permissions") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UserError(f"{path}: not a regular file; give the prefix of a dataset")
    return fd
