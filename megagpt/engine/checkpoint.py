"""Saving and loading a training run: the engine's fp32 weights and moments, to and from a checkpoint folder."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch.distributed as dist

from megagpt.engine.engine import Engine
from megagpt.engine.masters import read, write, write_counters
from megagpt.engine.storage import (
    LATEST,
    MOMENTS,
    WEIGHT,
    State,
    as_logical,
    check_resumable,
    empty_part,
    local_part,
    read_state,
    read_tensors,
    replace_text,
    tensor_name,
    write_state,
    write_tensors,
)


def save(engine: Engine, run_dir: Path, state: State) -> Path:
    """Write the checkpoint of `state.step` and move `latest` to it; returns its folder.

    Comm: collective over all ranks. Until the rename nothing of it is visible under its final name.
    """
    folder = run_dir / "checkpoints" / f"step-{state.step:06d}"
    temporary = folder.with_name(folder.name + ".tmp")
    if engine.mesh.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    dist.barrier()
    tensors = {}
    for named in engine.parameters:
        for key in (WEIGHT, *MOMENTS):
            local = read(engine, named, key)  # a collective: the second copy of a tied weight takes part too
            if named.owned:
                tensors[tensor_name(named, key)] = as_logical(local, named, engine.mesh)
    write_tensors(tensors, temporary)
    if engine.mesh.rank == 0:
        write_state(temporary, state)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        replace_text(folder.parent / LATEST, folder.name)
    dist.barrier()
    return folder


def load(engine: Engine, folder: Path) -> State:
    """Read a checkpoint into the engine, whatever layout wrote it.

    Comm: collective over all ranks.  Raises UserError where the architectures differ.
    """
    state = read_state(folder)
    check_resumable(engine.config, state, folder)
    keys = [(named, key) for named in engine.parameters for key in (WEIGHT, *MOMENTS)]
    tensors = {tensor_name(named, key): empty_part(named, engine.mesh, engine.device) for named, key in keys}
    read_tensors(tensors, folder)
    for named, key in keys:
        write(engine, named, key, local_part(tensors[tensor_name(named, key)]))
    write_counters(engine, state.step, state.counters)
    return state
