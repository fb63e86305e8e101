"""The process mesh: every rank's place on the axes pipe, data and model (DeepSpeed's topology order).

rank = (pipe * dp + data) * tp + model, so that tensor-parallel peers are neighbours (one host, fastest links).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist

from megagpt.parallel.axis import SINGLE, Axis


@dataclass(frozen=True)
class Mesh:
    """Built once in train.py; a layer receives only the axis that it uses."""

    pipe: Axis
    data: Axis
    model: Axis

    @property
    def rank(self) -> int:
        """Global rank of this process."""
        return (self.pipe.rank * self.data.size + self.data.rank) * self.model.size + self.model.rank

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.pipe.size * self.data.size * self.model.size

    @property
    def name(self) -> str:
        """This process in mesh terms, for messages."""
        return f"rank {self.rank} (pipe {self.pipe.rank}, data {self.data.rank}, model {self.model.rank})"


def single_process_mesh() -> Mesh:
    """The mesh of a program that never started torch.distributed."""
    return Mesh(pipe=SINGLE, data=SINGLE, model=SINGLE)


def build_mesh(*, pp: int, dp: int, tp: int) -> Mesh:
    """Create the process groups of every axis.

    Comm: collective over all processes (torch.distributed must be initialised, world size pp * dp * tp).
    """
    ranks = [[[(p * dp + d) * tp + m for m in range(tp)] for d in range(dp)] for p in range(pp)]
    rank = dist.get_rank()
    pipe, data, model = rank // (dp * tp), rank // tp % dp, rank % tp
    return Mesh(
        pipe=_axis([[ranks[p][d][m] for p in range(pp)] for d in range(dp) for m in range(tp)], pipe),
        data=_axis([[ranks[p][d][m] for d in range(dp)] for p in range(pp) for m in range(tp)], data),
        model=_axis([ranks[p][d] for p in range(pp) for d in range(dp)], model),
    )


def _axis(groups: list[list[int]], coordinate: int) -> Axis:
    """All ranks create all groups in the same order (torch's rule); each keeps its own."""
    size = len(groups[0])
    if size == 1:
        return SINGLE
    mine = None
    for ranks in groups:
        group = dist.new_group(ranks)
        if dist.get_rank() in ranks:
            mine = group
    return Axis(group=mine, rank=coordinate, size=size)
