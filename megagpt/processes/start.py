"""Starting and ending torch.distributed, whoever launched this process: deepspeed, torchrun, Slurm, or nobody."""

from __future__ import annotations

import logging
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from megagpt.errors import EXIT_PEER_LOST, EXIT_USER, UserError
from megagpt.parallel.mesh import Mesh, build_mesh
from megagpt.parallel.naming import rank_name
from megagpt.processes.agree import RankError
from megagpt.processes.launched import launched
from megagpt.processes.rendezvous import meet
from megagpt.processes.watch.limits import Limits
from megagpt.processes.watch.machine import machine_id
from megagpt.processes.watch.watch import Watch, start_watch

# torch's own timeout of a collective: none, in effect. The watch finds what hangs and knows more to say, and a job that
# was suspended over a weekend goes on.
NEVER = timedelta(days=365)


@contextmanager
def distributed(*, pp: int, dp: int, tp: int, limits: Limits | None = None) -> Iterator[tuple[Mesh, Watch]]:
    """The mesh of pp * dp * tp processes, and the watch over them, for as long as the block lasts.

    limits: when a rank counts as lost; by default `Limits()`.
    Comm: collective over all processes.
    Raises RankError: what a rank has to say ends all, with one message. Does not return where another rank was lost.
    """
    limits = limits or Limits()
    quiet()
    rank, store, machines = _meet(limits.progress_timeout_s, dp=dp, tp=tp)
    watch = start_watch(store, rank, pp=pp, dp=dp, tp=tp, machines=machines, limits=limits)
    try:
        yield _connect(store, rank, pp=pp, dp=dp, tp=tp), watch
    except RankError:  # every rank is on its way out
        watch.leave()
        dist.destroy_process_group()
        raise
    except UserError as error:  # met by this rank alone: it speaks
        watch.fail(EXIT_USER)
        raise RankError(f"{rank_name(rank, dp=dp, tp=tp)}: {error}", speaks=True) from error
    except Exception:  # perhaps because another rank has ended
        watch.doubt()
        watch.fail(EXIT_PEER_LOST)
        raise
    except KeyboardInterrupt:
        watch.fail(EXIT_PEER_LOST)
        raise
    except SystemExit:  # in good order
        watch.leave()
        raise
    watch.leave()
    dist.destroy_process_group()


def _meet(timeout_s: float, *, dp: int, tp: int) -> tuple[int, dist.Store, list[str]]:
    """This process's rank, the store of all, and the machine of each."""
    place = launched()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if place is None:
        return 0, dist.HashStore(), [machine_id()]
    store, machines = meet(
        place.rank, place.world_size, timeout_s, lambda rank: rank_name(rank, dp=dp, tp=tp), machine_id()
    )
    return place.rank, store, machines


def _connect(store: dist.Store, rank: int, *, pp: int, dp: int, tp: int) -> Mesh:
    on_gpu = torch.cuda.is_available()
    backend = "nccl" if on_gpu else "gloo"
    if on_gpu:
        _take_gpu(int(os.environ["LOCAL_RANK"]))
    wait_for_ever()
    dist.init_process_group(backend, store=store, rank=rank, world_size=pp * dp * tp, timeout=NEVER)
    return build_mesh("cuda" if on_gpu else "cpu", pp=pp, dp=dp, tp=tp)


def _take_gpu(local_rank: int) -> None:
    n_gpus = torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise UserError(
            f"LOCAL_RANK={local_rank} has no GPU: {socket.gethostname()} shows {n_gpus}; start at most {n_gpus} "
            "processes on it, or look at CUDA_VISIBLE_DEVICES"
        )
    torch.cuda.set_device(local_rank)


def wait_for_ever() -> None:
    """Let groups that are made from now on wait without end: the mesh's and DeepSpeed's, which take torch's default."""
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = NEVER


def quiet() -> None:
    """Drop what a user can neither read nor act on: details of the libraries beneath."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", message=r".*c10d::.*autograd kernel was not registered.*")
