"""The process mesh: every rank's place on the axes pipe, data and model (DeepSpeed's topology order).

rank = (pipe * dp + data) * tp + model, so that tensor-parallel peers are neighbours (one host, fastest links).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.distributed.device_mesh import init_device_mesh

from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.naming import rank_name


@dataclass(frozen=True)
class Mesh:
    """Built once at the start; a layer receives only the axis that it uses."""

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
        return rank_name(self.rank, dp=self.data.size, tp=self.model.size)


def single_process_mesh() -> Mesh:
    """The mesh of a program that never started torch.distributed."""
    return Mesh(pipe=SINGLE, data=SINGLE, model=SINGLE)


def build_mesh(device_type: str, *, pp: int, dp: int, tp: int) -> Mesh:
    """Create the process groups of every axis. device_type: "cpu" or "cuda".

    Comm: collective over all processes (torch.distributed must be initialised, world size pp * dp * tp).
    """
    mesh = init_device_mesh(device_type, (pp, dp, tp), mesh_dim_names=("pipe", "data", "model"))

    def axis(name: str) -> Axis:
        group = mesh.get_group(name)
        return Axis(group=group, rank=mesh.get_local_rank(name), size=group.size())

    return Mesh(pipe=axis("pipe"), data=axis("data"), model=axis("model"))
