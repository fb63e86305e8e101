"""Starting and ending torch.distributed, whoever launched this process: deepspeed, torchrun, Slurm, or nobody."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from megagpt.errors import EXIT_PEER_LOST, EXIT_USER, UserError
from megagpt.parallel.mesh import Mesh, build_mesh, rank_name
from megagpt.processes.agree import RankError
from megagpt.processes.rendezvous import meet
from megagpt.processes.watch.judge import Limits
from megagpt.processes.watch.watch import Watch, machine_id, start_watch

# torch's own timeout of a collective: behind the watch's, which knows more to say.
MARGIN_S = 60.0


@contextmanager
def distributed(*, pp: int, dp: int, tp: int, limits: Limits | None = None) -> Iterator[tuple[Mesh, Watch]]:
    """The mesh of pp * dp * tp processes, and the watch over them, for as long as the block lasts.

    limits: when a rank counts as lost; by default `Limits()`.
    Comm: collective over all processes.
    Raises RankError: what a rank has to say ends all, with one message. Does not return where another rank was lost.
    """
    limits = limits or Limits()
    quiet()
    mesh, watch = _connect(pp, dp, tp, limits)
    try:
        yield mesh, watch
    except RankError:  # every rank is on its way out
        watch.leave()
        dist.destroy_process_group()
        raise
    except UserError as error:  # met by this rank alone: it speaks
        watch.fail(EXIT_USER)
        raise RankError(f"{mesh.name}: {error}", speaks=True) from error
    except Exception as error:  # perhaps because another rank has ended
        watch.doubt(error)
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


def _connect(pp: int, dp: int, tp: int, limits: Limits) -> tuple[Mesh, Watch]:
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store, machines, rank, n_ranks = dist.HashStore(), [machine_id()], 0, 1
    if "RANK" in os.environ:
        rank, n_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store, machines = meet(
            rank, n_ranks, limits.progress_timeout_s, lambda r: rank_name(r, dp=dp, tp=tp), machine_id()
        )
    timeout = timedelta(seconds=limits.progress_timeout_s + MARGIN_S)
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=n_ranks, timeout=timeout)
    watch = start_watch(pp=pp, dp=dp, tp=tp, machines=machines, limits=limits)
    return build_mesh("cuda" if on_gpu else "cpu", pp=pp, dp=dp, tp=tp), watch


def quiet() -> None:
    """Drop what a user can neither read nor act on: details of the libraries beneath."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.")
    warnings.filterwarnings("ignore", message=r".*c10d::.*autograd kernel was not registered.*")
