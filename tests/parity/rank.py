"""What one rank does in a run of `parity.py`: trains on text that is a function of the sample's number, and reports.

The report is of logical tensors, by canonical name: each rank speaks for the pieces that no other rank has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.config import RunConfig
from megagpt.data.loader import MicroBatch, micro_batches
from megagpt.inventory.parameter import WEIGHT
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.mesh import build_mesh
from megagpt.parallel.parameter import Named
from megagpt.plan.plan import make_plan
from megagpt.processes.start import quiet
from megagpt.schedule import Schedule
from megagpt.train.step.engine import Engine, StepResult


class LocalPart(NamedTuple):
    """A rank's part of a logical tensor. dim: along which it is cut (None: whole); place: its number along dim."""

    name: str
    dim: int | None
    place: int
    values: Tensor


@dataclass(frozen=True)
class RankReport:
    """What one rank saw, and the pieces that it speaks for."""

    steps: list[StepResult]
    gradients: list[LocalPart]
    weights: list[LocalPart]


def train_on_rank(config: RunConfig, dp: int) -> RankReport:
    """Train on one of the ranks that `run_ranks` started.

    Comm: collective over all ranks.
    """
    engine = start_engine(config, dp)
    gradients = gradients_as_stepped(engine)
    steps = [engine.train_step(0, batches_of(config, 0, engine.mesh.data))]
    clipped = min(1.0, config.optim.clip / (steps[0].grad_norm + 1e-6)) if config.optim.clip else 1.0
    first = [piece._replace(values=piece.values / clipped) for piece in gradients()]
    steps += [engine.train_step(s, batches_of(config, s, engine.mesh.data)) for s in range(1, config.train.train_steps)]
    weights = pieces_of(engine, WEIGHT)
    engine.close()
    return RankReport(steps, first, weights)


def start_engine(config: RunConfig, dp: int) -> Engine:
    """The engine of one of the ranks that `run_ranks` started.

    Comm: collective over all ranks.
    """
    quiet()
    mesh = build_mesh("cpu", pp=config.parallel.pp, dp=dp, tp=config.parallel.tp)
    return Engine(config, make_plan(config, dist.get_world_size()), mesh)


def batches_of(config: RunConfig, step: int, data: Axis = SINGLE) -> Iterator[MicroBatch]:
    """This rank's micro-batches of a step, of text that is a function of the sample's number alone."""
    schedule, samples = Schedule(config), _Patterns(config.model.vocab, config.model.seq_len)
    positions, seq_len = schedule.positions(step), schedule.seq_len(step)
    return micro_batches(samples, config, positions, seq_len, dp_rank=data.rank, dp_size=data.size)


def gradients_as_stepped(engine: Engine) -> Callable[[], list[LocalPart]]:
    """Remember what the optimizer is given at the next step; call the result after it, for this rank's pieces.

    Comm: of that call, collective over all ranks.
    """
    kept: dict[Tensor, Tensor] = {}

    def keep(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        masters = [master for group in optimizer.param_groups for master in group["params"]]
        kept.update({m: m.grad.detach().clone() for m in masters if m.grad is not None})

    handle = engine.backend.optimizer.register_step_pre_hook(keep)

    def pieces() -> list[LocalPart]:
        handle.remove()
        whole = lambda s: s.named.part.unpadded(engine.masters.segments.whole(s, kept[s.master]))  # noqa: E731
        return _pieces(engine, lambda named: whole(engine.masters.segments.of[named.name]))

    return pieces


def pieces_of(engine: Engine, key: str) -> list[LocalPart]:
    """This rank's pieces of all weights (or of moments), unless another rank has the same.

    Comm: collective over all ranks.
    """
    return _pieces(engine, lambda named: engine.masters.read(named, key))


def _pieces(engine: Engine, values_of: Callable[[Named], Tensor]) -> list[LocalPart]:
    mesh, pieces = engine.mesh, []
    for named in engine.masters.parameters:
        values = values_of(named).cpu().clone()
        if named.owned and mesh.data.rank == 0 and (named.part.dim is not None or mesh.model.rank == 0):
            pieces.append(LocalPart(named.name, named.part.dim, mesh.model.rank, values))
    return pieces


class _Patterns:
    """Sample i is a function of i alone: a random pattern of a few letters, again and again.

    The letters lie all over the vocabulary, so that every rank of the model axis holds some.
    """

    def __init__(self, vocab_size: int, seq_len: int) -> None:
        self.letters, self.seq_len = np.linspace(0, vocab_size - 1, 8).astype(np.int64), seq_len

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, i: int) -> np.ndarray:
        pattern = np.random.default_rng(i).choice(self.letters, size=7)
        return np.resize(pattern, self.seq_len + 1)
