"""Tensors of a checkpoint: pieces of logical ones, in safetensors files, and an index that says where each lies.

Any box of a logical tensor can be read, whatever pieces it was written in: that is all that another layout needs.
Everything is fp32. Memory: what is read, and of the files, which are mapped, no more than MAPPED_BYTES.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from megagpt.errors import UserError
from megagpt.files import flush, require_regular, sha256_of

NAME = "index.json"

Box = tuple[slice, ...]
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
_MAX_DIMS = 8
MAPPED_BYTES = 128 << 20  # what was touched of a mapped file counts as memory of the process until it is closed


@dataclass(frozen=True)
class Piece:
    """A box of a logical tensor: file holds it, under the logical tensor's name. start, shape: in elements."""

    file: str
    start: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Logical:
    """A logical tensor: what a run of one process would hold."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


TensorIndex = dict[str, dict[str, Logical]]
"""key ("weight" or a moment) -> canonical name of the parameter -> its tensor: what index.json says."""


def file_name(key: str, rank: int, world_size: int) -> str:
    """The file that one rank writes for one key."""
    return f"{key}-{rank:05}-of-{world_size:05}.safetensors"


def write_pieces(path: Path, pieces: dict[str, np.ndarray]) -> str:
    """Write a safetensors file, wait until it is on the disk, and return its hash as it can be read back.

    pieces: contiguous fp32, by canonical name.
    """
    for name, values in pieces.items():
        assert values.dtype == np.float32 and values.flags.c_contiguous, name
    try:
        save_file(pieces, path)
    except SafetensorError as error:  # it wraps what the operating system says
        raise OSError(str(error)) from error
    with ThreadPoolExecutor(1) as pool:  # the disk works while the processor hashes
        flushing = pool.submit(flush, path)
        digest = sha256_of(path)
        flushing.result()
    return digest


def merge(parts: Iterable[TensorIndex]) -> TensorIndex:
    """One index of what several ranks wrote.  Raises ValueError for holes and overlaps: a bug in whoever wrote."""
    merged: dict[str, dict[str, tuple[tuple[int, ...], list[Piece]]]] = {}
    for part in parts:
        for key, tensors in part.items():
            for name, logical in tensors.items():
                merged.setdefault(key, {}).setdefault(name, (logical.shape, []))[1].extend(logical.pieces)
    index: TensorIndex = {}
    for key, tensors in merged.items():
        for name, (shape, pieces) in tensors.items():
            index.setdefault(key, {})[name] = Logical(shape, tuple(sorted(pieces, key=lambda p: p.start)))
            _require_tiling(key, name, index[key][name])
    return index


def index_json(index: TensorIndex) -> str:
    """The text of index.json."""
    plain = {key: {name: asdict(tensor) for name, tensor in tensors.items()} for key, tensors in index.items()}
    return json.dumps(plain, indent=0, sort_keys=True) + "\n"


def read_index(folder: Path) -> TensorIndex:
    """The index of a checkpoint.  Raises UserError where it is missing or not an index."""
    path = folder / NAME
    try:
        require_regular(path)
        plain = json.loads(path.read_bytes())
        index = {key: {name: _logical(tensor) for name, tensor in tensors.items()} for key, tensors in plain.items()}
        for key, tensors in index.items():
            for name, logical in tensors.items():
                _require_tiling(key, name, logical)
        return index
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not the index of a checkpoint ({error}); load another checkpoint") from None


class Reader:
    """Reads boxes of the logical tensors of one checkpoint; a context manager, for its open files."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.index = folder, read_index(folder)
        self._open: dict[str, Any] = {}
        self._files = ExitStack()
        self._touched_bytes = 0

    def shape(self, key: str, name: str) -> tuple[int, ...]:
        """Shape of a logical tensor.  Raises UserError where the checkpoint has none of that name."""
        return self.logical(key, name).shape

    def read(
        self, key: str, name: str, start: tuple[int, ...] = (), shape: tuple[int, ...] | None = None
    ) -> np.ndarray:
        """A box of a logical tensor as fp32; by default all of it.

        Raises UserError naming the file where a piece is missing or is not what the index says.
        """
        logical = self.logical(key, name)
        start, shape = start or (0,) * len(logical.shape), logical.shape if shape is None else shape
        out = np.empty(shape, np.float32)
        filled = 0
        for piece in logical.pieces:
            overlap = _overlap(start, shape, piece)
            if overlap is not None:
                into, of = overlap
                values = self._slice(piece, name, of)
                out[into] = values
                filled += values.size
                if self._touched_bytes > MAPPED_BYTES:
                    self.close()
        if filled != out.size:
            raise UserError(f"{self.folder}: {key} of {name} has holes; the checkpoint is damaged, load another")
        return out

    def check(self) -> None:
        """Compare the headers of all files with the index.  Raises UserError naming the first that differs."""
        for tensors in self.index.values():
            for name, logical in tensors.items():
                for piece in logical.pieces:
                    self._stored(piece, name)

    def close(self) -> None:
        """Let go of the files, and of the memory that they are mapped to. What is read next opens them again."""
        self._open.clear()
        self._files.close()
        self._touched_bytes = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def logical(self, key: str, name: str) -> Logical:
        """A logical tensor's shape and pieces.  Raises UserError where the checkpoint has none of that name."""
        try:
            return self.index[key][name]
        except KeyError:
            raise UserError(f"{self.folder} holds no {key} of {name}: it is of another architecture") from None

    def _slice(self, piece: Piece, name: str, of: Box) -> np.ndarray:
        stored = self._stored(piece, name)
        if not piece.shape:
            return self._open[piece.file].get_tensor(name)
        self._touched_bytes += 4 * (of[0].stop - of[0].start) * math.prod(piece.shape[1:])
        return stored[of]

    def _stored(self, piece: Piece, name: str) -> Any:
        """What a file holds of a piece, not read yet."""
        path = self.folder / piece.file
        try:
            if piece.file not in self._open:
                require_regular(path)
                self._open[piece.file] = self._files.enter_context(safe_open(path, framework="numpy"))
            stored = self._open[piece.file].get_slice(name)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); the checkpoint is damaged, load another") from None
        shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
        if (shape, dtype) != (piece.shape, "F32"):
            raise UserError(
                f"{path}: {name} is {dtype} of shape {shape}, {NAME} says F32 of {piece.shape}; "
                "the checkpoint is damaged, load another"
            )
        return stored


def _overlap(start: tuple[int, ...], shape: tuple[int, ...], piece: Piece) -> tuple[Box, Box] | None:
    """Where a box and a piece meet: as a part of the box and as a part of the piece."""
    into, of = [], []
    for box_start, box_size, piece_start, piece_size in zip(start, shape, piece.start, piece.shape, strict=True):
        first = max(box_start, piece_start)
        end = min(box_start + box_size, piece_start + piece_size)
        if end <= first:
            return None
        into.append(slice(first - box_start, end - box_start))
        of.append(slice(first - piece_start, end - piece_start))
    return tuple(into), tuple(of)


def _require_tiling(key: str, name: str, logical: Logical) -> None:
    """Raise ValueError unless the pieces fill the tensor, each element once, each from a file of its own.

    A sum of boxes is known by their corners, taken with alternating signs: they must be those of the whole tensor.
    """
    n_dims = len(logical.shape)
    corners: Counter[tuple[int, ...]] = Counter()
    signed = [(logical.shape, (0,) * n_dims, -1), *((p.shape, p.start, 1) for p in logical.pieces)]
    for shape, start, sign in signed:
        if not len(shape) == len(start) == n_dims <= _MAX_DIMS:
            raise ValueError(f"{key} of {name}: a piece of shape {shape} at {start} in a tensor of {logical.shape}")
        for ends in itertools.product((0, 1), repeat=n_dims):
            corner = tuple(s + end * size for s, end, size in zip(start, ends, shape, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    if any(corners.values()) or len({p.file for p in logical.pieces}) < len(logical.pieces):
        raise ValueError(f"{key} of {name}: its pieces do not make up a tensor of shape {logical.shape}")


def _logical(plain: dict[str, Any]) -> Logical:
    pieces = tuple(Piece(_plain_name(p["file"]), _sizes(p["start"]), _sizes(p["shape"])) for p in plain["pieces"])
    return Logical(_sizes(plain["shape"]), pieces)


def _sizes(values: list[int]) -> tuple[int, ...]:
    if not all(type(v) is int and v >= 0 for v in values):
        raise ValueError(f"got {values}, wanted sizes")
    return tuple(values)


def _plain_name(name: str) -> str:
    if not _FILE.fullmatch(name):  # no path, and neither "." nor ".."
        raise ValueError(f"got {name!r}, wanted the name of a file beside it")
    return name
