"""Large tensors in rows that fit into memory, and safetensors files written as such rows come."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from megagpt.checkpoint.pieces import Reader

CHUNK_BYTES = 32 << 20

Shape = tuple[int, ...]
Start = tuple[int, ...]


def row_boxes(shape: Shape, rows: range | None = None) -> Iterator[tuple[Start, Shape]]:
    """Boxes (start, shape) of at most CHUNK_BYTES of fp32 that make up a tensor, or these rows of it, in order."""
    if not shape:
        yield (), ()
        return
    rows = range(shape[0]) if rows is None else rows
    row_bytes = 4 * math.prod(shape[1:])
    n_rows = max(1, CHUNK_BYTES // max(1, row_bytes))
    for first in range(rows.start, rows.stop, n_rows):
        yield (first, *[0] * (len(shape) - 1)), (min(n_rows, rows.stop - first), *shape[1:])


def read_chunks(reader: Reader, key: str, name: str, rows: range | None = None) -> Iterator[np.ndarray]:
    """A logical tensor, or these rows of it, chunk by chunk."""
    for start, shape in row_boxes(reader.shape(key, name), rows):
        yield reader.read(key, name, start, shape)


def write_chunks(
    path: Path,
    shapes: Mapping[str, Shape],
    chunks_of: Callable[[str], Iterable[np.ndarray]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file of fp32 tensors and wait until it is on the disk. Memory: one chunk.

    shapes: of the tensors by name. chunks_of: a tensor's values in order, in parts of any size.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            n_values = 0
            for chunk in chunks_of(name):
                assert chunk.dtype == np.float32, (name, chunk.dtype)
                file.write(np.ascontiguousarray(chunk, "<f4").data)
                n_values += chunk.size
            assert n_values == math.prod(shape), name
        file.flush()
        os.fsync(file.fileno())
