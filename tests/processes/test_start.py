"""What a connected process group is told."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megagpt.processes.local import run_ranks
from megagpt.processes.start import wait_for_ever


def late(patient: bool) -> str:
    """Rank 1 comes 2 s late to a group whose collectives and messages may take 1 s by default."""
    distributed_c10d.default_pg_timeout = timedelta(seconds=1)
    if patient:
        wait_for_ever()
    group = dist.new_group()
    try:
        for communicate in (
            lambda: dist.all_reduce(torch.ones(1), group=group),
            lambda: dist.send(torch.ones(1), 0, group) if dist.get_rank() else dist.recv(torch.ones(1), 1, group),
        ):
            if dist.get_rank() == 1:
                time.sleep(2.0)
            communicate()
    except RuntimeError as error:
        return str(error)
    return "patient"


def test_no_collective_ends_by_itself():
    """A job may be suspended for hours."""
    assert run_ranks(late, 2, True) == ["patient"] * 2
    assert "Timed out" in run_ranks(late, 2, False)[0], "else the line above could not fail"
