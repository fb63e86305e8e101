"""The mesh: who shares an axis with whom, and failing together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from megagpt.errors import UserError
from megagpt.parallel.mesh import build_mesh, single_process_mesh
from megagpt.processes.agree import together
from megagpt.processes.local import run_ranks


def members(pp: int, dp: int, tp: int) -> dict:
    """This rank's coordinates, and the global ranks that each of its axes connects."""
    mesh = build_mesh("cpu", pp=pp, dp=dp, tp=tp)
    assert mesh.rank == dist.get_rank() and mesh.world_size == dist.get_world_size()
    found = {}
    for name, axis in (("pipe", mesh.pipe), ("data", mesh.data), ("model", mesh.model)):
        ranks = [torch.zeros(1, dtype=torch.int64) for _ in range(axis.size)]
        dist.all_gather(ranks, torch.tensor([dist.get_rank()]), group=axis.group)
        found[name] = (axis.rank, [int(r) for r in ranks])
    return found


def test_axes_connect_the_ranks_that_differ_in_one_coordinate():
    results = run_ranks(members, 8, 2, 2, 2)
    # rank = (pipe * 2 + data) * 2 + model
    assert results[0] == {"pipe": (0, [0, 4]), "data": (0, [0, 2]), "model": (0, [0, 1])}
    assert results[5] == {"pipe": (1, [1, 5]), "data": (0, [5, 7]), "model": (1, [4, 5])}
    assert results[6] == {"pipe": (1, [2, 6]), "data": (1, [4, 6]), "model": (0, [6, 7])}


def test_sizes_may_differ():
    results = run_ranks(members, 6, 1, 3, 2)
    assert results[3] == {"pipe": (0, [3]), "data": (1, [1, 3, 5]), "model": (1, [2, 3])}


def test_one_process_needs_no_torch_distributed():
    mesh = single_process_mesh()
    assert (mesh.rank, mesh.world_size) == (0, 1)
    assert not dist.is_initialized()


def fail_on(bad_ranks: list[int]) -> tuple[str, bool] | str:
    def work() -> str:
        if dist.get_rank() in bad_ranks:
            raise UserError(f"rank {dist.get_rank()} has no file")
        return f"result of {dist.get_rank()}"

    try:
        return together(work)
    except UserError as error:
        return str(error), error.speaks


@pytest.mark.parametrize("bad_ranks", [[1], [1, 2]])
def test_all_fail_with_the_message_of_the_first_and_one_speaks(bad_ranks):
    message = "rank 1 has no file"
    assert run_ranks(fail_on, 3, bad_ranks) == [(message, False), (message, True), (message, False)]


def test_together_returns_each_ranks_own_result():
    assert run_ranks(fail_on, 2, []) == ["result of 0", "result of 1"]
