"""From the command line to running ranks: checks first, then text, then as many processes as the layout needs.

Everything before the ranks start needs no torch, so that a wrong flag is answered in a moment and once.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from megagpt.checkpoint.folders import require_begun
from megagpt.cli import parse_run_config
from megagpt.config import RunConfig
from megagpt.data.opened import with_text
from megagpt.errors import EXIT_PEER_LOST, announce, run_cli
from megagpt.plan.plan import make_plan
from megagpt.train.step.deepspeed.settings import deepspeed_settings, types_not_taken

# What would misinform the ranks that this program starts. torchrun's last one is a trap: rank 0 would not open the
# store that all the ranks then wait for.
FROM_A_LAUNCHER = (
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE",
    "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE",
)  # fmt: skip


def pretrain(argv: Sequence[str]) -> None:
    """The program behind examples/pretrain_gpt.py: exits with 0, or with a code of errors.py and one message."""
    run_program(lambda: _pretrain(argv))


def run_program(main: Callable[[], None]) -> None:
    """Run what each rank of a program runs, and end the process."""
    try:
        run_cli(main, speaks=os.environ.get("RANK", "0") == "0")
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
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
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


def _pretrain(argv: Sequence[str]) -> None:
    config = parse_run_config(argv)
    n_ranks = ranks_to_start(config)
    require_begun(config.checkpoint)
    for note in [] if n_ranks else types_not_taken(config):  # the ranks say it
        announce(note)
    config, data = with_text(config)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        # Several ranks agree first on who speaks (train/loop.py): each machine may have its own copy.
        _ = data.datasets
    if n_ranks:
        sys.exit(start_ranks(n_ranks, argv))
    # torch and DeepSpeed load only now: the checks above answer at once, and DeepSpeed reads DS_ACCELERATOR.
    importlib.import_module("megagpt.train.loop").train(config, data)


def has_gpu() -> bool:
    """Whether this machine has an NVIDIA driver; asking torch would cost seconds."""
    return Path("/dev/nvidiactl").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != ""


def start_ranks(n_ranks: int, argv: Sequence[str]) -> int:
    """Start this program n_ranks times by DeepSpeed's launcher of local processes; returns the exit code."""
    announce(f"no GPU here: starting {n_ranks} processes on the CPU (gloo), as this layout needs")
    environment = {name: value for name, value in os.environ.items() if name not in FROM_A_LAUNCHER}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_ranks)))
    ranks = base64.urlsafe_b64encode(json.dumps({"localhost": list(range(n_ranks))}).encode()).decode()
    command = [sys.executable, "-m", "deepspeed.launcher.launch", "--log_level=critical", "--no_local_rank"]
    command += [f"--world_info={ranks}", "--master_addr=127.0.0.1", f"--master_port={_free_port()}"]
    # In a session of its own, so that a Ctrl-C reaches the ranks once: from here.
    with subprocess.Popen([*command, sys.argv[0], *argv], env=environment, start_new_session=True) as launcher:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda received, _frame: _tell_ranks(launcher.pid, received))
        code = launcher.wait()
    if code > 128:  # the other ranks name the one that was killed; by what, only its parent knows
        print(f"note: a rank was killed by signal {256 - code} (9: often for lack of memory)", file=sys.stderr)
        return EXIT_PEER_LOST  # as those others: whichever of them the launcher saw first
    return code


def _tell_ranks(launcher: int, number: int) -> None:
    """Hand a signal to the ranks themselves: DeepSpeed's launcher would end them, and lose their exit code."""
    for process in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
