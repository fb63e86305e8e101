"""New checkpoints from others, without an engine and in bounded memory: in other files, or their mean."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from megagpt.checkpoint import pieces
from megagpt.checkpoint.chunks import Shape, read_chunks, row_boxes, write_chunks
from megagpt.checkpoint.integrity import write_tables
from megagpt.checkpoint.pieces import Logical, Piece, Reader, TensorIndex
from megagpt.checkpoint.state import State, read_state
from megagpt.errors import UserError
from megagpt.files import flush, os_reason, sha256_of
from megagpt.inventory.parameter import WEIGHT

Rows = Callable[[str, str, range], Iterable[np.ndarray]]
"""(key, name, rows) -> the values of these rows in order, in parts of any size."""

Tick = Callable[[int], None]
"""Told how many bytes have been written."""


def reshape(source: Path, out: Path, n_files: int, tick: Tick = lambda n_bytes: None) -> None:
    """Write the same checkpoint into n_files files a key, each with a like share of every tensor's rows.

    Raises UserError where a file of the source cannot be read, `out` exists or cannot be written, or n_files is more
    than any tensor has rows.
    """
    with Reader(source) as reader:
        shapes = {key: {name: t.shape for name, t in tensors.items()} for key, tensors in reader.index.items()}
        write_checkpoint(out, read_state(source), shapes, partial(read_chunks, reader), n_files, tick)


def average(sources: Sequence[Path], out: Path, tick: Tick = lambda n_bytes: None, key: str = WEIGHT) -> None:
    """Write the mean of the weights, summed in float64; the moments have no meaning for it and are left out.

    key: what to take for the weights: "ema" for the average that the run kept of them.
    The rest of the state is that of the last source.
    Raises UserError where the sources are of different architectures, or files cannot be read or written.
    """
    last = read_state(sources[-1])
    names = ", ".join(f"{source.parent.parent.name}/{source.name}" for source in sources)
    what = f"mean of {len(sources)}" + f", {key}" * (key != WEIGHT)
    at = replace(last, origin=f"{what} ({names})", validation_loss=None, validation_score=None, counters={})
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(source)) for source in sources]
        for reader in readers:
            if key not in reader.index:
                raise UserError(f"{reader.folder} holds no {key}, only {', '.join(reader.index)}; choose among these")
        shapes = {name: logical.shape for name, logical in readers[-1].index[key].items()}
        for reader in readers:
            theirs = {name: logical.shape for name, logical in reader.index[key].items()}
            for name in sorted(shapes.keys() | theirs.keys()):
                if theirs.get(name) != shapes.get(name):
                    raise UserError(
                        f"{reader.folder} has {name} of shape {theirs.get(name)}, {sources[-1]} of {shapes.get(name)}; "
                        "only checkpoints of one architecture have a mean"
                    )
        write_checkpoint(out, at, {WEIGHT: shapes}, partial(_mean, readers, key), 1, tick)


def write_checkpoint(
    out: Path,
    at: State,
    shapes: Mapping[str, Mapping[str, Shape]],
    rows_of: Rows,
    n_files: int = 1,
    tick: Tick = lambda n_bytes: None,
) -> None:
    """Write a whole checkpoint folder, which is there when it is complete and on the disk.

    shapes: of the logical tensors, key -> name. Raises UserError where `out` exists or cannot be written.
    """
    most_rows = max((n for tensors in shapes.values() for shape in tensors.values() for n in shape[:1]), default=1)
    if not 1 <= n_files <= most_rows:
        raise UserError(f"--files {n_files}: the largest tensor has {most_rows} rows; give 1 to {most_rows}")
    with new_folder(out) as folder:
        parts: list[TensorIndex] = []
        hashes = {}
        for key, tensors in shapes.items():
            for number in range(n_files):
                file = pieces.file_name(key, number, n_files)
                held = {
                    name: Piece(file, *_box(shape, rows))
                    for name, shape in tensors.items()
                    if (rows := _rows_of_file(shape, number, n_files))
                }

                def chunks(name: str, key: str = key, held: dict[str, Piece] = held) -> Iterator[np.ndarray]:
                    piece = held[name]
                    first, n_rows = (*piece.start, 0)[0], (*piece.shape, 1)[0]
                    for chunk in rows_of(key, name, range(first, first + n_rows)):
                        yield chunk
                        tick(chunk.nbytes)

                write_chunks(folder / file, {name: piece.shape for name, piece in held.items()}, chunks)
                hashes[file] = sha256_of(folder / file)
                parts.append({key: {name: Logical(tensors[name], (piece,)) for name, piece in held.items()}})
        write_tables(folder, pieces.merge(parts), at, hashes)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, that becomes `out` at once when all went well, and else leaves nothing.

    Raises UserError where `out` exists, or cannot be written.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"{out} exists; give another --out, or remove it")
    temporary = out.with_name(f"{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        flush(temporary)
        os.replace(temporary, out)  # fails where somebody else has made it meanwhile
        flush(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out} ({os_reason(error)}); make room there or give another --out") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _mean(readers: Sequence[Reader], key: str, _: str, name: str, rows: range) -> Iterator[np.ndarray]:
    for start, shape in row_boxes(readers[0].shape(key, name), rows):
        total = np.zeros(shape, np.float64)
        for reader in readers:
            total += reader.read(key, name, start, shape)
        total /= len(readers)
        yield total.astype(np.float32)


def _rows_of_file(shape: Shape, number: int, n_files: int) -> range:
    """The rows of a tensor that one of several files has: as equal as can be, the larger ones first."""
    n_rows = shape[0] if shape else 1
    few, larger = divmod(n_rows, n_files)
    first = number * few + min(number, larger)
    return range(first, first + few + (number < larger))


def _box(shape: Shape, rows: range) -> tuple[tuple[int, ...], Shape]:
    """Rows of a tensor as a box: start and shape."""
    return ((rows.start, *[0] * (len(shape) - 1)), (len(rows), *shape[1:])) if shape else ((), ())
