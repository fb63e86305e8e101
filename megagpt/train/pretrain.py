"""From the command line to running ranks: checks first, then text, then as many processes as the layout needs.

Everything before the ranks start needs no torch, so that a wrong flag is answered in a moment and once.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from megagpt.checkpoint.folders import require_begun
from megagpt.cli import parse_run_config
from megagpt.config import RunConfig
from megagpt.data.opened import with_text
from megagpt.errors import UserError, announce, run_cli
from megagpt.plan.plan import make_plan
from megagpt.processes.forked import run_forked
from megagpt.processes.launched import launched, n_processes, speaks
from megagpt.processes.signals import follow_launcher
from megagpt.streams import endure_streams, ready_streams
from megagpt.train.step.deepspeed.settings import deepspeed_settings, types_not_taken

T = TypeVar("T")


def pretrain(argv: Sequence[str]) -> None:
    """The program behind examples/pretrain_gpt.py: exits with 0, or with a code of errors.py and one message."""
    run_program(lambda: _pretrain(argv))


def run_program(main: Callable[[], None]) -> None:
    """Run what each rank of a program runs, and end the process."""
    follow_launcher()
    ready_streams()
    endure_streams()
    try:
        run_cli(main, speaks=speaks())
    except SystemExit as stop:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without taking the interpreter apart: a thread of gloo that lets go of a tensor meanwhile would abort it (seen
        # once in some 50 ends, on a busy machine: "terminate called without an active exception").
        os._exit(stop.code if isinstance(stop.code, int) else 0)


def ranks_to_start(config: RunConfig) -> int:
    """The processes that this one has to start for the layout; 0 where a launcher has, or where one is enough.

    Raises UserError where layout and number of processes do not fit.
    """
    world_size = n_processes()
    needed = config.parallel.tp * config.parallel.pp
    start_ranks = world_size == 1 and needed > 1 and not has_gpu()
    # The vocabulary is not known yet and plays no part in these checks: any number does.
    guess = dataclasses.replace(config.model, vocab_size=config.model.vocab_size or 1)
    config = dataclasses.replace(config, model=guess)
    plan = make_plan(config, needed if start_ranks else world_size)
    deepspeed_settings(config, plan, on_gpu=has_gpu())  # a user's JSON is read, and contradicts nothing
    if not has_gpu():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it had to guess
    return needed if start_ranks else 0


def before_they_meet(config: RunConfig, prepare: Callable[[], T]) -> T:
    """prepare(), on every rank by itself; what goes wrong on one machine alone ends the ranks of all."""
    try:
        return prepare()
    except UserError as error:
        place = launched()
        if place and not place.on_one_machine:  # the others may have what is missing here, and would wait
            importlib.import_module("megagpt.train.loop").fail(config, error)  # needs torch to tell them
        raise


def on_ranks(n_ranks: int, module: str, run: Callable[[Any], None]) -> None:
    """Run run(module) here, or, unless n_ranks is 0, in that many processes of this machine; these end the program.

    module: the name of what loads torch. It is imported here, once for all ranks, and only now: what can be checked
    before that has been, and DeepSpeed, once it is loaded, has read DS_ACCELERATOR.
    """
    if not n_ranks:
        if speaks():
            print("loading PyTorch and DeepSpeed", flush=True)
        return run(importlib.import_module(module))
    announce(f"no GPU here: starting {n_ranks} processes on the CPU (gloo), as this layout needs")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_ranks)))
    loaded = importlib.import_module(module)
    importlib.import_module("megagpt.train.step.deepspeed.preload")  # what each rank would import later
    sys.exit(run_forked(n_ranks, lambda: run_program(lambda: run(loaded))))


def _pretrain(argv: Sequence[str]) -> None:
    config = parse_run_config(argv)
    n_ranks = ranks_to_start(config)
    require_begun(config.checkpoint)
    for note in [] if n_ranks else types_not_taken(config):  # the ranks say it
        announce(note)
    config, data = before_they_meet(config, lambda: with_text(config))
    if n_processes() == 1:
        # Several ranks agree first on who speaks (train/loop.py): each machine may have its own copy.
        _ = data.datasets
    # torch loads only now: the checks above answer at once.
    on_ranks(n_ranks, "megagpt.train.text", lambda text: text.train_on_text(config, data))


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA driver; asking torch would cost seconds."""
    return Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""
