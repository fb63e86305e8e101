"""A rank that dies, stops, hangs or fails: the others end in time, with the right code, and one message names it."""

from __future__ import annotations

import re
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagpt.engine.start import distributed
from megagpt.errors import EXIT_PEER_LOST, EXIT_USER, SILENT_S, UserError
from megagpt.parallel.collectives import all_reduce
from megagpt.parallel.judge import Limits
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.watch import Watch
from tests.watched import start

HOST = re.escape(socket.gethostname())
QUICK = Limits(heartbeat_timeout_s=3.0, progress_timeout_s=3.0)
NAMES = [f"rank {r} (pipe {r // 2}, data 0, model {r % 2})" for r in range(4)]


def work(mesh: Mesh, watch: Watch, step: int) -> None:
    """A step with the communication of a real one: over the model axis, and from stage to stage."""
    with watch.step(step):
        x = torch.ones(4)
        x = all_reduce(x, mesh.model)
        stage_size = mesh.data.size * mesh.model.size
        if mesh.pipe.rank > 0:
            dist.recv(x, mesh.rank - stage_size)
        if mesh.pipe.rank < mesh.pipe.size - 1:
            dist.send(x, mesh.rank + stage_size)
        all_reduce(x, mesh.data)
        time.sleep(0.01)


def forever(mesh: Mesh, watch: Watch) -> None:
    for step in range(1, 1_000_000):
        work(mesh, watch, step)
        if step == 3:
            print("working", flush=True)


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 4, 1), (4, 1, 1), (2, 1, 2)])
def test_a_killed_rank_is_named_at_once(tmp_path, shape):
    with start(tmp_path, forever, shape, Limits()) as ranks:
        ranks.wait_for("working")
        ranks.signal(2, signal.SIGKILL)
        assert ranks.end(10.0) == [EXIT_PEER_LOST, EXIT_PEER_LOST, -signal.SIGKILL, EXIT_PEER_LOST]
        print(ranks.all_output)
        (error,) = ranks.errors
