"""Checkpoints that do not know the layout: logical tensors in safetensors files and a small JSON, no pickle.

    RUN/checkpoints/step-000100/tensors/*.safetensors   fp32 weights and Adam moments by canonical name
    RUN/checkpoints/step-000100/state.json              configuration, step, samples and tokens consumed, data identity
    RUN/checkpoints/latest                              the name of the newest complete one; moves last

Every rank writes its own slices; torch.distributed.checkpoint reads whatever slices another layout needs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from megagpt.config import RunConfig
from megagpt.engine.engine import Engine
from megagpt.engine.masters import MOMENTS, WEIGHT, read, set_adam_step, write
from megagpt.engine.stages import Named, named_parameters
from megagpt.errors import UserError
from megagpt.parallel.mesh import Mesh

LATEST = "latest"
FORMAT = 1


@dataclass(frozen=True)
class State:
    """What a checkpoint knows beside its tensors. step: optimizer steps done. samples, tokens: consumed by them."""

    step: int
    samples: int
    tokens: int
    loss_scale: float
    config: dict[str, Any]
    data: dict[str, Any]


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
                tensors[_tensor_name(named, key)] = _as_logical(local, named, engine.mesh)
    with _quiet_torch():
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(temporary / "tensors"), save_distributed=True))
    if engine.mesh.rank == 0:
        _write_text(temporary / "state.json", json.dumps({"format": FORMAT, **dataclasses.asdict(state)}, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        _write_text(folder.parent / LATEST, folder.name)
    dist.barrier()
    return folder


def load(engine: Engine, folder: Path) -> State:
    """Read a checkpoint into the engine, whatever layout wrote it.

    Comm: collective over all ranks.  Raises UserError where the architectures differ.
    """
    state = read_state(folder)
    check_architecture(engine.config, state, folder)
    keys = [(named, key) for named in engine.parameters for key in (WEIGHT, *MOMENTS)]
    tensors = {_tensor_name(named, key): _empty(named, engine.mesh, engine.device) for named, key in keys}
    _read_tensors(tensors, folder)
    for named, key in keys:
        write(engine, named, key, _local(tensors[_tensor_name(named, key)]))
    set_adam_step(engine, state.step)
    return state


def find(path: str | Path) -> Path:
    """The checkpoint folder that --load means: itself, or the latest one of a run folder."""
    path = Path(path)
    if (path / "state.json").exists():
        return path
    pointer = path / "checkpoints" / LATEST
    if not pointer.exists():
        raise UserError(f"no checkpoint in {path}: wanted {path}/state.json or {pointer}; check --load")
    name = pointer.read_text().strip()
    folder = pointer.parent / name
    if not name or Path(name).name != name or not (folder / "state.json").exists():
        raise UserError(f"{pointer} names {name!r}, which is no checkpoint; give --load one of {_known(pointer.parent)}")
    return folder


def read_state(folder: Path) -> State:
    """The JSON of a checkpoint."""
    path = folder / "state.json"
    try:
        raw = json.loads(path.read_text())
        if raw.pop("format") != FORMAT:
            raise UserError(f"{path}: unknown format; this version reads format {FORMAT}")
        return State(**raw)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint's state ({error}); load another checkpoint") from error


def check_architecture(config: RunConfig, state: State, folder: Path) -> None:
    """The checkpoint must hold the model that this run builds; dropout may differ."""
    for name, ours in dataclasses.asdict(config.model).items():
        theirs = state.config["model"].get(name)
        if theirs != ours and not name.startswith("dropout_"):
            raise UserError(
                f"{folder} holds a model with model.{name}={theirs}, this run wants {ours}; "
                f"use --model.{name.replace('_', '-')} {theirs}, or train from scratch without --load"
            )


def load_weights(module: torch.nn.Module, mesh: Mesh, folder: Path) -> None:
    """Read only the weights into a model that no engine holds (evaluation, generation).

    Comm: collective where the mesh has several processes.
    """
    parameters = named_parameters(module)
    tensors = {_tensor_name(n, WEIGHT): _empty(n, mesh, n.parameter.device) for n in parameters}
    _read_tensors(tensors, folder)
    for named in parameters:
        named.part.unpadded(named.parameter.data).copy_(_local(tensors[_tensor_name(named, WEIGHT)]))


def _read_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    with _quiet_torch():
        reader = HuggingFaceStorageReader(str(folder / "tensors"))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def _tensor_name(named: Named, key: str) -> str:
    return named.name if key == WEIGHT else f"{named.name}.{key}"


def _empty(named: Named, mesh: Mesh, device: torch.device) -> Tensor:
    """Memory for this rank's part of a logical tensor."""
    shape = list(named.part.shape)
    if named.part.dim is not None:
        shape[named.part.dim] = named.part.length
    return _as_logical(torch.empty(shape, dtype=torch.float32, device=device), named, mesh)


def _as_logical(local: Tensor, named: Named, mesh: Mesh) -> Tensor:
    """The local part as what it is in the logical tensor: a DTensor over the stage, copied over its data axis."""
    if mesh.stage is None:
        return local
    placement: Placement = Replicate() if named.part.dim is None else Shard(named.part.dim)
    shape = torch.Size(named.part.shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh.stage, [Replicate(), placement], run_check=False, shape=shape, stride=stride)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Without warnings about details of torch's own checkpointing that a user cannot act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield


def _write_text(path: Path, text: str) -> None:
    """Replace a small file at once: readers see the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _known(folder: Path) -> str:
    return ", ".join(str(p) for p in sorted(folder.glob("step-*")) if p.is_dir() and p.suffix != ".tmp") or "(none)"
