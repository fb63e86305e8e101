"""Whether a checkpoint is as it was written: the hash of every file, and three tables that must agree.

safetensors has no checksum and a JSON has none either: one flipped bit would be read as a weight. SHA256SUMS has the
format of sha256sum, so that `sha256sum -c SHA256SUMS` says the same without this program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable
from pathlib import Path

import numpy as np

from megagpt.checkpoint import pieces, state
from megagpt.checkpoint.chunks import row_boxes
from megagpt.checkpoint.pieces import Reader, TensorIndex
from megagpt.checkpoint.state import State
from megagpt.errors import UserError
from megagpt.files import os_reason, replace_text, require_regular, sha256_of
from megagpt.optim.rules import SQUARES

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_.-]+)")


def sums_text(sums: dict[str, str]) -> str:
    """SHA256SUMS for hashes by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def read_sums(folder: Path) -> dict[str, str]:
    """Hash by file name.  Raises UserError where the file is missing or is not what `sums_text` writes."""
    path = folder / SUMS
    try:
        require_regular(path)
        text = path.read_bytes().decode("ascii")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: {folder} is no checkpoint, or an unfinished one; load another") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the checkpoint is damaged, load another") from None
    sums: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise UserError(f"{path}, line {number}: got {line[:80]!r}; the checkpoint is damaged, load another")
        sums[match[2]] = match[1]
    if text != sums_text(sums) or not sums:
        raise UserError(f"{path}: cut short, or not in order; the checkpoint is damaged, load another")
    return sums


def damage_to(folder: Path, names: Iterable[str], sums: dict[str, str]) -> list[str]:
    """What is wrong with these files of a checkpoint: one line each, empty where all are as they were written."""
    found = []
    for name in names:
        path = folder / name
        try:
            got = sha256_of(path)
        except (FileNotFoundError, NotADirectoryError):
            found.append(f"{path}: missing")
        except OSError as error:
            found.append(f"{path}: cannot be read ({os_reason(error)})")
        else:
            if name not in sums:
                found.append(f"{path}: not in {SUMS}")
            elif got != sums[name]:
                found.append(f"{path}: its contents have changed (sha256 {got[:12]}…, written as {sums[name][:12]}…)")
    return found


def bad_numbers_in(reader: Reader, files: Container[str]) -> list[str]:
    """Tensors that lie in these files and that nothing can be computed with, one line each: their hashes may be right.

    Memory: one chunk.  Raises UserError where a file is not what the index says.
    """
    found = []
    for key, tensors in reader.index.items():
        for name, logical in tensors.items():
            for piece in logical.pieces:
                if piece.file not in files:
                    continue
                n_not_finite = n_negative = 0
                for start, shape in row_boxes(piece.shape):
                    offset = tuple(a + b for a, b in zip(piece.start, start, strict=True))
                    chunk = reader.read(key, name, offset, shape)
                    n_not_finite += chunk.size - int(np.isfinite(chunk).sum())
                    n_negative += int((chunk < 0).sum()) if key in SQUARES else 0
                if n_not_finite or n_negative:
                    what = f"{n_not_finite} NaN or Inf" if n_not_finite else f"{n_negative} negative squares"
                    found.append(f"{reader.folder / piece.file}: {key} of {name} holds {what}")
    return found


def write_tables(folder: Path, index: TensorIndex, at: State, tensor_sums: dict[str, str]) -> None:
    """Write state.json, index.json and last SHA256SUMS beside the tensors. tensor_sums: hash by file name."""
    hashes = dict(tensor_sums)
    for name, text in {pieces.NAME: pieces.index_json(index), state.NAME: state.state_json(at)}.items():
        replace_text(folder / name, text)
        hashes[name] = sha256_of(folder / name)
    replace_text(folder / SUMS, sums_text(hashes))


def read_tables(folder: Path) -> dict[str, str]:
    """Hash by name of every file of a checkpoint, those of the tensors not compared yet.

    Raises UserError where a table is damaged, or the index names a file that has no hash.
    """
    hashes = read_sums(folder)
    if wrong := damage_to(folder, (state.NAME, pieces.NAME), hashes):
        raise UserError(f"{wrong[0]}; load another checkpoint")
    state.read_state(folder)
    for tensors in pieces.read_index(folder).values():
        for logical in tensors.values():
            for piece in logical.pieces:
                if piece.file not in hashes:
                    raise UserError(f"{folder / SUMS}: has no {piece.file}; the checkpoint is damaged, load another")
    return hashes


def damage_of(folder: Path, tick: Callable[[int], None] = lambda n_bytes: None) -> list[str]:
    """Everything that is wrong with a checkpoint, one line each; empty where it is whole.

    tick: told how many bytes have been compared, file by file.
    """
    try:
        hashes = read_sums(folder)
    except UserError as error:
        return [str(error)]
    found = []
    for name in sorted({*hashes, state.NAME, pieces.NAME}):
        found += (wrong := damage_to(folder, [name], hashes))
        tick(0 if wrong else (folder / name).stat().st_size)
    if not found:
        try:
            read_tables(folder)
            with Reader(folder) as reader:
                reader.check()
                found += bad_numbers_in(reader, hashes)
        except UserError as error:
            found.append(str(error))
    return found
