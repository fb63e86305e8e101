"""A run that begins with the weights of another, its MLPs factorised; and what that costs and saves.

Each dense matrix becomes the product of fewer parameters that is nearest to it in Frobenius norm: exactly so for
low_rank and monarch, whose blocks are independent; a butterfly is exact for what is a butterfly, and a good guess for
what is not. Computed in float64. One matrix is in memory at a time, beside what its projection takes.

Shapes: O outputs, I inputs; the parameters and their letters as in megagpt/model/mlp.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megagpt.checkpoint import folders
from megagpt.checkpoint.chunks import read_chunks
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.rewrite import new_folder, write_checkpoint
from megagpt.checkpoint.state import State, read_state
from megagpt.checkpoint.strict import STRICT, require_same_names
from megagpt.cli import read_config, to_yaml
from megagpt.config import ModelConfig, RunConfig, plain
from megagpt.errors import UserError
from megagpt.inventory.layers import canonical
from megagpt.inventory.parameter import WEIGHT
from megagpt.model.gpt import GPT
from megagpt.model.mlp import MLPS
from megagpt.model.mlp.kind import Direction, Product
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.linear import SUMMED


@dataclass(frozen=True)
class MatrixError:
    """How far the factorised matrix is from the dense one, as a share of that (Frobenius norms)."""

    name: str
    relative_error: float


def factorise(weight: Tensor, model: ModelConfig, direction: Direction) -> dict[str, Tensor]:
    """The parameters of the model's kind of matrix nearest to weight, by name, in weight's dtype.

    Shapes: weight (O, I), or (2, O, I) for the up matrix of a gated unit, pack by pack; parameters likewise.
    """
    if weight.ndim == 3:
        packs = [factorise(pack, model, direction) for pack in weight]
        return {name: torch.stack([pack[name] for pack in packs]) for name in packs[0]}
    found = MLPS[model.mlp](model).project(weight, direction)
    return {name: values.to(weight.dtype).contiguous() for name, values in found.items()}


@torch.no_grad()
def multiplied(parameters: dict[str, Tensor], model: ModelConfig, direction: Direction) -> Tensor:
    """The dense matrix (O, I), or (2, O, I), that parameters stand for: what they make of the unit vectors."""
    kind = MLPS[model.mlp](model)
    assert isinstance(kind, Product), model.mlp
    n_inputs = model.d_model if direction == "up" else model.ff_width
    units = torch.eye(n_inputs, dtype=next(iter(parameters.values())).dtype)
    multiply = kind.multiply_up if direction == "up" else kind.multiply_down
    y = multiply(parameters, units, SINGLE, SUMMED).T
    return y.unflatten(0, (2, -1)) if model.gated and direction == "up" else y


def write_factorised(
    source: Path, out: Path, changes: dict[str, object], tick: Callable[[MatrixError], None] = lambda error: None
) -> list[MatrixError]:
    """Write a run folder with a checkpoint of step 0: source's weights, each MLP matrix projected; how far, by layer.

    source: a checkpoint folder. changes: of ModelConfig: mlp, and mlp_rank or mlp_blocks. tick: told of each matrix.
    Raises UserError, and leaves nothing, where source is not dense, the sizes do not fit, or `out` exists.
    """
    at = read_state(source)
    dense = read_config(at.config, f"{source}/state.json")
    if dense.model.mlp != "dense":
        raise UserError(f"{source} has MLPs of kind {dense.model.mlp} already; give a checkpoint with dense ones")
    config = replace(dense, model=replace(dense.model, **changes))
    with Reader(source) as reader, new_folder(out) as folder:
        projection = _Projection(reader, config.model, tick)
        held = reader.index.get(WEIGHT, {})
        require_same_names(source, WEIGHT, held, canonical(dense.model), offered=STRICT)
        shapes = {name: parameter.shape for name, parameter in canonical(config.model).items()}
        begun = State(
            step=0,
            samples=0,
            tokens=0,
            lr=0.0,
            counters={"skipped_steps": 0},
            config=plain(config),
            data=at.data,
            origin=f"{config.model.mlp} form of {source.parent.parent.name}/{source.name}",
        )
        checkpoint = folders.folder_of(folder, 0)
        write_checkpoint(checkpoint, begun, {WEIGHT: shapes}, projection.rows)
        folders.point_to(checkpoint)
        # How the old run was saved, guarded and spread out is not how a new one is to be.
        begins = RunConfig(model=config.model, data=config.data, optim=config.optim, train=config.train)
        (folder / "config.yaml").write_text(to_yaml(begins), encoding="utf-8")
    return [projection.errors[matrix] for matrix in matrices_of(config.model)]


def matrices_of(model: ModelConfig) -> dict[str, Direction]:
    """The MLP matrices of a model by canonical name: "blocks.3.mlp.up" -> "up"."""
    directions: tuple[Direction, ...] = ("up", "down")
    return {f"blocks.{i}.mlp.{d}": d for i in range(model.n_layers) for d in directions}


class _Projection:
    """The tensors of the new checkpoint as rows: read, or projected, those of the last matrix kept."""

    def __init__(self, reader: Reader, model: ModelConfig, tick: Callable[[MatrixError], None]) -> None:
        self.reader, self.model, self.tick = reader, model, tick
        self.matrices = matrices_of(model)
        self.errors: dict[str, MatrixError] = {}
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    def rows(self, key: str, name: str, rows: range) -> Iterable[np.ndarray]:
        matrix, _, factor = name.rpartition(".")
        if matrix in self.matrices and name not in self.reader.index[WEIGHT]:
            yield self._factors(matrix)[factor].numpy()[rows.start : rows.stop]
        else:
            yield from read_chunks(self.reader, key, name, rows)

    def _factors(self, matrix: str) -> dict[str, Tensor]:
        if self._last[0] != matrix:
            direction = self.matrices[matrix]
            weight = torch.from_numpy(self.reader.read(WEIGHT, f"{matrix}.weight"))
            factors = factorise(weight, self.model, direction)
            off = multiplied(factors, self.model, direction) - weight
            error = MatrixError(matrix, float(off.double().norm() / weight.double().norm()))
            self.errors[matrix] = error
            self.tick(error)
            self._last = (matrix, factors)
        return self._last[1]


def step_times(models: dict[str, ModelConfig], micro_batch_size: int, repeats: int = 15) -> dict[str, float]:
    """Median seconds of a training step of each model (forward, backward, AdamW), in turn, on this process.

    In fp32 on a CPU, in bf16 on a GPU.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {name: _stepper(model, micro_batch_size, device) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if repeat > 0:  # the first warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def _stepper(config: ModelConfig, micro_batch_size: int, device: torch.device) -> Callable[[], None]:
    model = GPT(config, SINGLE).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens_BT = torch.randint(config.vocab, (micro_batch_size, config.seq_len), device=device)

    def step() -> None:
        model(tokens_BT, labels_BT=tokens_BT).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step
