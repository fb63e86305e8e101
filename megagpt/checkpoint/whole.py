"""A checkpoint as a whole: its three tables, which must agree, and everything that can be wrong with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megagpt.checkpoint import pieces, state, sums
from megagpt.checkpoint.pieces import Index, Reader
from megagpt.checkpoint.state import State
from megagpt.errors import UserError
from megagpt.files import replace_text


def write_tables(folder: Path, index: Index, at: State, tensor_sums: dict[str, str]) -> None:
    """Write state.json, index.json and last SHA256SUMS beside the tensors. tensor_sums: hash by file name."""
    hashes = dict(tensor_sums)
    for name, text in {pieces.NAME: pieces.index_json(index), state.NAME: state.state_json(at)}.items():
        replace_text(folder / name, text)
        hashes[name] = sums.sha256_of(folder / name)
    replace_text(folder / sums.NAME, sums.to_text(hashes))


def read_tables(folder: Path) -> dict[str, str]:
    """Hash by name of every file of a checkpoint, those of the tensors not compared yet.

    Raises UserError where a table is damaged, or the index names a file that has no hash.
    """
    hashes = sums.read_sums(folder)
    if wrong := sums.damage(folder, (state.NAME, pieces.NAME), hashes):
        raise UserError(f"{wrong[0]}; load another checkpoint")
    state.read_state(folder)
    for tensors in pieces.read_index(folder).values():
        for logical in tensors.values():
            for piece in logical.pieces:
                if piece.file not in hashes:
                    raise UserError(
                        f"{folder / sums.NAME}: has no {piece.file}; the checkpoint is damaged, load another"
                    )
    return hashes


def damage_of(folder: Path, tick: Callable[[int], None] = lambda n_bytes: None) -> list[str]:
    """Everything that is wrong with a checkpoint, one line each; empty where it is whole.

    tick: told how many bytes have been compared, file by file.
    """
    try:
        hashes = sums.read_sums(folder)
    except UserError as error:
        return [str(error)]
    found = []
    for name in sorted({*hashes, state.NAME, pieces.NAME}):
        found += (wrong := sums.damage(folder, [name], hashes))
        tick(0 if wrong else (folder / name).stat().st_size)
    if not found:
        try:
            read_tables(folder)
            with Reader(folder) as reader:
                reader.check()
        except UserError as error:
            found.append(str(error))
    return found
