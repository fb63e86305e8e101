"""Starting and ending torch.distributed, whoever launched this process: deepspeed, torchrun, Slurm, or nobody."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megagpt.errors import SILENT_S, UserError
from megagpt.parallel.agree import RankError
from megagpt.parallel.mesh import Mesh, build_mesh

TIMEOUT = timedelta(minutes=10)  # of one collective


@contextmanager
def distributed(*, pp: int, dp: int, tp: int) -> Iterator[Mesh]:
    """The mesh of pp * dp * tp processes, for as long as the block lasts.

    Comm: collective over all processes.
    """
    quiet()
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "nccl" if on_gpu else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    mesh = build_mesh("cuda" if on_gpu else "cpu", pp=pp, dp=dp, tp=tp)
    try:
        yield mesh
    except RankError:
        dist.destroy_process_group()  # every rank is on its way out
        raise
    except UserError as error:  # met by this rank alone: it speaks; the others wait for it in vain, or lose it
        raise RankError(f"{mesh.name}: {error}", speaks=True) from error
    except RuntimeError:  # perhaps because another rank has ended: let that one speak and the launcher act
        time.sleep(SILENT_S)
        raise
    dist.destroy_process_group()


def quiet() -> None:
    """Drop what a user can neither read nor act on: details of the libraries beneath."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", message=r".*c10d::.*autograd kernel was not registered.*")
