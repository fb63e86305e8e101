"""Checkpoint folders: where they are, what their JSON says, and their tensors as parts of logical ones.

    RUN/checkpoints/step-000100/tensors/*.safetensors   fp32 weights and Adam moments by canonical name
    RUN/checkpoints/step-000100/state.json              configuration, step, samples and tokens consumed, data identity
    RUN/checkpoints/latest                              the name of the newest complete one; moves last

No pickle, and nothing of the layout: torch.distributed.checkpoint reads whatever slices another layout needs.
"""

from __future__ import annotations

import dataclasses
import json
import os
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
from megagpt.engine.named import Named, named_parameters
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.parallel.mesh import Mesh

LATEST = "latest"
FORMAT = 1
WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class State:
    """What a checkpoint knows beside its tensors.

    step: steps done. samples, tokens: consumed by them. counters: what the engine counts (`masters.read_counters`).
    """

    step: int
    samples: int
    tokens: int
    counters: dict[str, float]
    config: dict[str, Any]
    data: dict[str, Any]


def write_state(folder: Path, state: State) -> None:
    """The JSON of a checkpoint."""
    replace_text(folder / "state.json", json.dumps({"format": FORMAT, **dataclasses.asdict(state)}, indent=1))


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
        raise UserError(
            f"{pointer} names {name!r}, which is no checkpoint; give --load one of {_known(pointer.parent)}"
        )
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


def check_resumable(config: RunConfig, state: State, folder: Path) -> None:
    """What a run that goes on must keep: the architecture, and what the order of the samples follows from.

    Dropout, layout, precision, learning rate and the number of steps may change.
    """
    fixed = {f"model.{name}": value for name, value in dataclasses.asdict(config.model).items()}
    fixed = {name: value for name, value in fixed.items() if "dropout" not in name}
    fixed["train.global_batch_size"] = config.train.global_batch_size
    fixed["train.seed"] = config.train.seed
    for name, ours in fixed.items():
        section, key = name.split(".")
        theirs = state.config.get(section, {}).get(key)
        if theirs != ours:
            raise UserError(
                f"{folder} was trained with {name}={theirs}, this run wants {ours}; "
                f"take the settings of that run: --config {folder.parent.parent / 'config.yaml'}"
            )


def load_weights(model: GPT, mesh: Mesh, folder: Path) -> None:
    """Read only the weights into a model that no engine holds (evaluation, generation).

    Comm: collective where the mesh has several processes.
    """
    parameters = named_parameters(model)
    tensors = {tensor_name(n, WEIGHT): empty_part(n, mesh, n.parameter.device) for n in parameters}
    read_tensors(tensors, folder)
    for named in parameters:
        named.part.unpadded(named.parameter.data).copy_(local_part(tensors[tensor_name(named, WEIGHT)]))


def write_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write each rank's parts; of equal copies over the data axis one is written. Comm: collective."""
    with _quiet_torch():
        dcp.save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder / "tensors"), save_distributed=True))


def read_tensors(tensors: dict[str, Tensor], folder: Path) -> None:
    """Fill the tensors, reading from each file only what this rank needs. Comm: collective."""
    with _quiet_torch():
        reader = HuggingFaceStorageReader(str(folder / "tensors"))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def tensor_name(named: Named, key: str) -> str:
    """A tensor's name in the files; key: "weight" or a moment."""
    return named.name if key == WEIGHT else f"{named.name}.{key}"


def empty_part(named: Named, mesh: Mesh, device: torch.device) -> Tensor:
    """Memory for this rank's part of a logical tensor."""
    shape = list(named.part.shape)
    if named.part.dim is not None:
        shape[named.part.dim] = named.part.length
    return as_logical(torch.empty(shape, dtype=torch.float32, device=device), named, mesh)


def as_logical(local: Tensor, named: Named, mesh: Mesh) -> Tensor:
    """The local part as what it is in the logical tensor: a DTensor over the stage, copied over its data axis."""
    if mesh.stage is None:
        return local
    placement: Placement = Replicate() if named.part.dim is None else Shard(named.part.dim)
    shape = torch.Size(named.part.shape)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh.stage, [Replicate(), placement], run_check=False, shape=shape, stride=stride)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a logical tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Without warnings about details of torch's own checkpointing that a user cannot act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\.distributed")
        yield


def replace_text(path: Path, text: str) -> None:
    """Replace a small file at once: readers see the old text or the new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _known(folder: Path) -> str:
    return ", ".join(str(p) for p in sorted(folder.glob("step-*")) if p.is_dir() and p.suffix != ".tmp") or "(none)"
