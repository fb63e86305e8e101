"""What a run needs before it trains: its data, its folder, the checkpoint it goes on from; all that can be missing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megagpt.checkpoint import folders
from megagpt.checkpoint.adapters import base_from_load, find_base, weights_sha256
from megagpt.checkpoint.load import check_resumable, find_whole
from megagpt.checkpoint.state import DataState, read_state
from megagpt.cli import to_yaml
from megagpt.config import RunConfig
from megagpt.data.loader import MicroBatch, micro_batches
from megagpt.data.tokenizers.kept import keep
from megagpt.data.tokenizers.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.files import os_reason, replace_text
from megagpt.inventory.parameter import WEIGHT
from megagpt.parallel.mesh import Mesh
from megagpt.processes.agree import together
from megagpt.train.source import AnySamples, Source

if TYPE_CHECKING:
    from megagpt.plan.plan import Plan


@dataclass(frozen=True)
class Run:
    """All that the loop needs, the same on every rank but for `mesh`."""

    config: RunConfig
    plan: Plan
    mesh: Mesh
    folder: Path
    source: Source
    train_samples: AnySamples
    valid_samples: AnySamples | None
    tokenizer: Tokenizer | None
    data_identity: DataState
    resume_from: Path | None
    base_sha256: str = ""


def find_run(config: RunConfig, source: Source, plan: Plan, mesh: Mesh, stack: ExitStack) -> Run | None:
    """Find the data, the checkpoint and the run folder.

    stack: holds the run folder's lock.  Returns None where --auto-resume finds that all steps are done.
    Comm: collective over all ranks.  Raises a RankError for what is missing or damaged, on any rank.
    """
    config = together(lambda: base_from_load(config))
    folder = [together(lambda: _make_run_folder(config, stack) if mesh.rank == 0 else Path())]
    dist.broadcast_object_list(folder, src=0)
    resume_from = _find_checkpoint(config, mesh)
    if resume_from and together(lambda: _check_resumable(config, resume_from)):
        if mesh.rank == 0:
            folders.drop_old(resume_from, config.checkpoint)  # it may have been killed before that
            print(f"nothing to do: {resume_from} has done all {config.train.train_steps} steps")
        return None
    config, base_sha256 = _find_base(config, resume_from, mesh)
    train_samples, valid_samples = together(lambda: source.samples(config))
    together(lambda: source.verify(config))
    tokenizer = together(lambda: source.tokenizer(config))
    identity = source.identity(config, train_samples, tokenizer)
    together(lambda: _write_config(config, folder[0], tokenizer) if mesh.rank == 0 else None)
    found = train_samples, valid_samples, tokenizer, identity, resume_from, base_sha256
    return Run(config, plan, mesh, folder[0], source, *found)


def _find_checkpoint(config: RunConfig, mesh: Mesh) -> Path | None:
    """The whole checkpoint to go on from; None for a new run."""
    load, fallback = config.checkpoint.load, config.checkpoint.load_fallback
    if config.checkpoint.auto_resume:
        assert config.checkpoint.save is not None  # the configuration has checked that
        load = config.checkpoint.save if folders.checkpoints_of(Path(config.checkpoint.save)) else None
    if load is None:
        return None
    say = partial(print, flush=True) if mesh.rank == 0 else lambda _: None
    return find_whole(load, fallback, say, newest_will_do=fallback or config.checkpoint.auto_resume)


def _find_base(config: RunConfig, resume_from: Path | None, mesh: Mesh) -> tuple[RunConfig, str]:
    """The configuration with the checkpoint of weights that adapters are for, every byte looked at; and their hash."""
    if config.lora.rank is None:
        return config, ""
    config = together(lambda: find_base(config, read_state(resume_from) if resume_from else None))
    say = partial(print, flush=True) if mesh.rank == 0 else lambda _: None
    folder = find_whole(str(config.lora.base), False, say, keys=[WEIGHT])
    return config, together(lambda: weights_sha256(folder))


def _check_resumable(config: RunConfig, folder: Path) -> bool:
    """Whether nothing is left to do.  Raises UserError where this run cannot go on from there."""
    state = read_state(folder)
    check_resumable(config, state, folder)
    if state.step < config.train.train_steps:
        return False
    if config.checkpoint.auto_resume:
        return True
    raise UserError(f"{folder} has done {state.step} steps already; go on with a larger --train-steps")


def _make_run_folder(config: RunConfig, stack: ExitStack) -> Path:
    """--save, else the run that --load goes on with, else a new folder under runs/; locked until `stack` closes."""
    wanted = config.checkpoint
    if wanted.save is None and wanted.load is not None:
        folder = folders.run_of(wanted.load)
        if not folders.checkpoints_of(folder):
            folders.find(wanted.load)  # raises, before anything is written
    else:
        folder = Path(wanted.save) if wanted.save else _new_folder()
    goes_on = wanted.load is not None or wanted.auto_resume
    if not goes_on and (folder / "checkpoints").exists():
        raise UserError(f"{folder} holds a run already; go on with it by --load {folder}, or give another --save")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(folders.locked(folder))
        folders.mend(folder)
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder} ({os_reason(error)}); give another --save") from error
    return folder


def _new_folder() -> Path:
    """runs/TIME, made; with a number behind where another run has begun in the same second."""
    name = f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
    for folder in map(Path, chain([name], (f"{name}-{number}" for number in count(2)))):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"cannot make the run folder {folder} ({os_reason(error)}); give another --save") from error
        return folder
    raise AssertionError("numbers do not end")


def _write_config(config: RunConfig, folder: Path, tokenizer: Tokenizer | None) -> None:
    """The settings beside the run, and its tokenizer, so that it is whole where it is moved to."""
    if tokenizer is not None:
        keep(tokenizer, folder)
    try:
        replace_text(folder / "config.yaml", to_yaml(config))
    except OSError as error:
        raise UserError(
            f"cannot write {folder}/config.yaml ({os_reason(error)}); make room, or another --save"
        ) from error


def batches_of(run: Run, samples: AnySamples, positions: range, seq_len: int) -> Iterator[MicroBatch]:
    """This rank's micro-batches of the samples at these positions."""
    data = run.mesh.data
    return micro_batches(samples, run.config, positions, seq_len, dp_rank=data.rank, dp_size=data.size)
