"""Saving and loading a training run: the engine's fp32 weights and moments, to and from a checkpoint folder.

A checkpoint is first written beside its place, by all ranks at once: each its own share of the logical tensors, so that
data-parallel ranks neither hold nor write the same twice. Its name appears when every rank has flushed and hashed what
it wrote; `latest` moves after that. A crash at any moment leaves the checkpoints before, or this one as well.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megagpt.checkpoint import folders, pieces, sums
from megagpt.checkpoint import state as states
from megagpt.checkpoint.durable import flush, replace_text
from megagpt.checkpoint.pieces import MOMENTS, WEIGHT, Index, Logical, Piece, Reader
from megagpt.checkpoint.state import State
from megagpt.engine.engine import Engine
from megagpt.engine.masters import read, write, write_counters
from megagpt.engine.named import Named
from megagpt.errors import UserError
from megagpt.parallel.agree import together
from megagpt.parallel.mesh import Mesh

KEYS = (WEIGHT, *MOMENTS)


@dataclass(frozen=True)
class Saved:
    """A finished save. n_bytes: of the whole checkpoint; write_s: from the first byte to the moved pointer."""

    folder: Path
    n_bytes: int
    write_s: float


Held = dict[str, dict[str, np.ndarray]]
"""key -> canonical name -> this rank's piece."""


def save(engine: Engine, run: Path, state: State, group: dist.ProcessGroup | None = None) -> Saved:
    """Write the checkpoint of `state.step` and move `latest` to it.

    Memory: one key of this rank's share at a time.  Comm: collective over all ranks; `group` has all of them.
    Raises a RankError on all ranks where one cannot write, or holds a NaN or Inf; what was there before stays.
    """
    start = time.perf_counter()
    temporary = _make_room(run, state.step, engine.mesh, group)
    index: Index = {}
    for key in KEYS:
        held = {key: dict(share(engine, key))}
        index |= together(lambda held=held: _write_share(held, engine, temporary), group, _abandon(temporary))
    return _commit(index, temporary, run, state, engine, group, start)


def share(engine: Engine, key: str) -> Iterator[tuple[str, np.ndarray]]:
    """This rank's pieces of all weights (or a moment), by canonical name, in host memory.

    Comm: collective over the data axis, parameter by parameter.
    """
    writers = assign_writers(engine.parameters, engine.mesh)
    for named in engine.parameters:
        local = read(engine, named, key)  # a collective: every rank takes part, whoever keeps the result
        if writers[named.name] and named.owned and local.numel() > 0:
            yield named.name, local.float().cpu().contiguous().numpy()


def assign_writers(parameters: list[Named], mesh: Mesh) -> dict[str, bool]:
    """For each parameter, whether this rank writes its piece: of the equal copies over the data axis one does.

    Each goes to the data rank that has least so far; a tensor that no axis cuts, to the first model rank.
    """
    loads = [0] * mesh.data.size
    mine = {}
    for named in parameters:
        chosen = loads.index(min(loads))
        loads[chosen] += math.prod(named.part.shape)
        mine[named.name] = chosen == mesh.data.rank and (named.part.dim is not None or mesh.model.rank == 0)
    return mine


def _write_share(held: Held, engine: Engine, folder: Path) -> Index:
    """Write this rank's files, one a key; their index."""
    places = {named.name: named.part for named in engine.parameters}
    index: Index = {}
    for key, tensors in held.items():
        for name, values in tensors.items():
            if not np.isfinite(values).all():
                raise UserError(f"{key} of {name} holds a NaN or Inf, so step is not saved; the checkpoint before stays")
        file = pieces.file_name(key, engine.mesh.rank, engine.mesh.world_size)
        try:
            pieces.write_pieces(folder / file, tensors)
        except OSError as error:
            raise UserError(_cannot_write(folder, error)) from error
        index[key] = {}
        for name, values in tensors.items():
            part = places[name]
            start = tuple(part.start if d == part.dim else 0 for d in range(len(part.shape)))
            index[key][name] = Logical(part.shape, (Piece(file, start, values.shape),))
    return index
