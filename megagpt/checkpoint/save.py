"""Saving a training run: its fp32 weights and moments, and where it stands.

A checkpoint is first written beside its place, by all ranks at once: each some pieces of the logical tensors, so that
data-parallel ranks neither hold nor write the same twice. Its name appears when every rank has flushed and hashed what
it wrote; `latest` moves after that. A crash at any moment leaves the checkpoints before, or this one as well.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import numpy as np
import torch.distributed as dist

from megagpt.checkpoint import folders, pieces
from megagpt.checkpoint.integrity import write_tables
from megagpt.checkpoint.pieces import Logical, Piece, TensorIndex
from megagpt.checkpoint.state import State
from megagpt.config import CheckpointConfig
from megagpt.errors import UserError
from megagpt.files import delete, os_reason
from megagpt.optim.segments import place_of
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.parameter import Named
from megagpt.processes.agree import together

if TYPE_CHECKING:
    from megagpt.train.step.masters import Masters

Held = dict[str, dict[str, np.ndarray]]
"""key -> canonical name -> this rank's piece, in host memory."""


@dataclass(frozen=True)
class Saved:
    """A finished save. stopped_s: how long the training stood still for it. n_bytes: of the tensors, over all ranks."""

    folder: Path
    n_bytes: int
    write_s: float
    stopped_s: float

    def __str__(self) -> str:
        rate = self.n_bytes / 2**20 / self.write_s
        return (
            f"saved {self.folder}: {self.n_bytes / 2**20:.1f} MiB in {self.write_s:.2f} s ({rate:.0f} MiB/s), "
            f"training stood still for {self.stopped_s:.2f} s"
        )


class Saver:
    """Saves checkpoints of one run, one at a time; with async_save from a copy, while training goes on."""

    def __init__(self, masters: Masters, run: Path, config: CheckpointConfig, resumed_from: Path | None = None) -> None:
        """Comm: collective over all ranks (a group for the files alone, which the training does not wait on)."""
        self._masters, self._run, self._config, self._newest = masters, run, config, resumed_from
        group = dist.new_group(backend="gloo")
        assert isinstance(group, dist.ProcessGroup)  # every rank is in it
        self._group = group
        self._thread: Thread | None = None
        self._outcome: Saved | Exception | None = None

    def save(self, at: State) -> None:
        """Save the run as it is now. A save that is still going on is waited for.

        Comm: collective over all ranks.  Raises a RankError on all of them where one cannot write, or holds a NaN or
        Inf; with async_save not here but at the next call of `wait`.
        """
        start = time.perf_counter()
        self.wait()
        if self._config.async_save:
            held = {key: _copied(_pieces_to_write(self._masters, key)) for key in self._masters.kept}
            stopped_s = time.perf_counter() - start
            self._thread = Thread(target=self._run_in_background, args=(held, at, stopped_s), name="save")
            self._thread.start()
        else:
            # One key in memory at a time.
            chunks = ({key: dict(_pieces_to_write(self._masters, key))} for key in self._masters.kept)
            self._outcome = self._write(chunks, at, None)

    @property
    def failed(self) -> bool:
        """Whether a save in the background came to nothing, as far as this rank knows by now."""
        return isinstance(self._outcome, Exception)

    def newest(self) -> Path | None:
        """The checkpoint that the run could go back to, once nothing is being saved any more."""
        self.wait()
        return self._newest

    def finished(self, wait: bool = False) -> Saved | None:
        """The save that has ended since the last call, if one has. wait: for one that goes on, and raise its error."""
        if wait:
            self.wait()
        if self.failed:  # not raised here: the ranks learn of it at different moments, and must raise it at one
            return None
        outcome, self._outcome = self._outcome, None
        assert not isinstance(outcome, Exception)
        return outcome

    def wait(self) -> None:
        """Until nothing is being saved any more.  Raises what the save raised: on all ranks, which all call this."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if isinstance(error := self._outcome, Exception):
            self._outcome = None
            raise error

    def _run_in_background(self, held: Held, at: State, stopped_s: float) -> None:
        try:
            self._outcome = self._write([held], at, stopped_s)
        except Exception as error:  # the training raises it: see `wait`
            self._outcome = error

    def _write(self, chunks: Iterable[Held], at: State, stopped_s: float | None) -> Saved:
        """Write a checkpoint. Comm: collective over this object's group."""
        start = time.perf_counter()
        final, rank_0 = folders.folder_of(self._run, at.step), self._masters.mesh.rank == 0
        temporary = final.with_name(final.name + ".tmp")
        try:
            together(lambda: _make_room(temporary) if rank_0 else None, self._group)
            written = [
                together(lambda held=held: _write_files(held, self._masters, temporary), self._group) for held in chunks
            ]
            ranks: list[list[Written]] | None = [[]] * dist.get_world_size() if rank_0 else None
            dist.gather_object(written, ranks, group=self._group)
            parts = [part for rank in ranks or [] for part in rank]
            together(lambda: _commit(parts, temporary, final, at, self._config) if rank_0 else None, self._group)
        except UserError:
            if rank_0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        write_s = time.perf_counter() - start
        n_bytes, self._newest = sum(part.n_bytes for part in parts), final
        return Saved(final, n_bytes, write_s, write_s if stopped_s is None else stopped_s)


@dataclass(frozen=True)
class Written:
    """What one rank has written of a checkpoint."""

    index: TensorIndex
    sums: dict[str, str]
    n_bytes: int


def assign_writers(parameters: list[Named], mesh: Mesh) -> dict[str, int]:
    """For each parameter the data rank that writes it, of those that hold the same: whichever has least so far."""
    loads = [0] * mesh.data.size
    chosen = {}
    for named in parameters:
        data_rank = loads.index(min(loads))
        loads[data_rank] += math.prod(named.part.shape) if named.owned else 0
        chosen[named.name] = data_rank
    return chosen


def _pieces_to_write(masters: Masters, key: str) -> Iterator[tuple[str, np.ndarray]]:
    """This rank's pieces of all weights (or of what else is kept under a key), by canonical name.

    Comm: collective over the data axis, parameter by parameter.
    """
    mesh, writers = masters.mesh, assign_writers(masters.parameters, masters.mesh)
    for named in masters.kept[key]:
        local = masters.read(named, key)  # a collective: every rank takes part, whoever keeps the result
        is_shared_out = place_of(named, key).dim is not None
        mine = writers[named.name] == mesh.data.rank and (is_shared_out or mesh.model.rank == 0)
        if named.owned and mine and local.numel() > 0:
            yield named.name, local.float().cpu().contiguous().numpy()


def _copied(found: Iterable[tuple[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Values that stay as they are while training goes on."""
    return {name: values.copy() for name, values in found}


def _write_files(held: Held, masters: Masters, folder: Path) -> Written:
    """Write this rank's files, one a key, and hash them as they can be read back."""
    by_name = {named.name: named for named in masters.parameters}
    index: TensorIndex = {}
    hashes: dict[str, str] = {}
    for key, tensors in held.items():
        file = pieces.file_name(key, masters.mesh.rank, masters.mesh.world_size)
        index[key] = {}
        for name, values in tensors.items():
            if not np.isfinite(values).all():
                raise UserError(
                    f"{key} of {name} holds a NaN or Inf: not saved; go on from the checkpoint before: --load"
                )
            part = place_of(by_name[name], key)
            start = tuple(part.start if d == part.dim else 0 for d in range(len(part.shape)))
            index[key][name] = Logical(part.shape, (Piece(file, start, values.shape),))
        if tensors:
            try:
                hashes[file] = pieces.write_pieces(folder / file, tensors)
            except OSError as error:
                raise UserError(_cannot_write(folder, error)) from error
    return Written(index, hashes, sum(v.nbytes for tensors in held.values() for v in tensors.values()))


def _make_room(temporary: Path) -> None:
    try:
        delete(temporary)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(_cannot_write(temporary, error)) from error


def _commit(parts: list[Written], temporary: Path, final: Path, at: State, config: CheckpointConfig) -> None:
    """Give a checkpoint whose tensors are on the disk its name, and `latest` to it; drop what need not be kept."""
    hashes = {name: digest for part in parts for name, digest in part.sums.items()}
    missing = [name for name in hashes if not (temporary / name).exists()]
    if missing:
        raise UserError(
            f"{temporary / missing[0]} was written by another process and is not to be seen here; "
            "give a --save that all hosts share"
        )
    try:
        write_tables(temporary, pieces.merge(part.index for part in parts), at, hashes)
        folders.commit(temporary, final)
        folders.drop_old(final, config)
    except OSError as error:
        raise UserError(_cannot_write(final, error)) from error


def _cannot_write(folder: Path, error: OSError) -> str:
    return (
        f"cannot write {folder} ({os_reason(error)}); make room there or give another --save: the checkpoints "
        "before it are as they were"
    )
