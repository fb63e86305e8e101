"""Training, read from top to bottom: start, steps, and what is left when they are done."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megagpt import metrics
from megagpt.checkpoint import folders
from megagpt.checkpoint.durable import replace_text
from megagpt.checkpoint.state import State, check_resumable, read_state
from megagpt.checkpoint.sums import sha256_of
from megagpt.cli import to_yaml
from megagpt.config import RunConfig
from megagpt.data.blend import Samples, build_splits, parse_data_path, sources
from megagpt.data.indexed import verify
from megagpt.data.loader import MicroBatch, micro_batches
from megagpt.data.tokenizer import Tokenizer, tokenizer_for
from megagpt.engine import checkpoint
from megagpt.engine.checkpoint import Saver
from megagpt.engine.checks import check_ranks
from megagpt.engine.engine import Engine
from megagpt.engine.fault_notes import FaultNotes
from megagpt.engine.guard import Guard
from megagpt.engine.masters import read_counters
from megagpt.engine.restore import find_whole
from megagpt.engine.start import distributed
from megagpt.engine.stopping import Stopper
from megagpt.errors import Stopped, UserError
from megagpt.kernels import Kernels
from megagpt.model.gpt import ops_used
from megagpt.ops.status import check_kernels, kernel_rows
from megagpt.parallel.agree import together
from megagpt.parallel.judge import Limits
from megagpt.parallel.mesh import Mesh
from megagpt.parallel.watch import Watch
from megagpt.plan.plan import Plan, make_plan
from megagpt.plan.table import config_table, plan_table
from megagpt.plot import plot_runs
from megagpt.report import Reporter, kernel_table


@dataclass(frozen=True)
class Run:
    """All that the loop needs, the same on every rank but for `mesh`."""

    config: RunConfig
    plan: Plan
    mesh: Mesh
    folder: Path
    train_samples: Samples
    valid_samples: Samples | None
    tokenizer: Tokenizer | None
    data_identity: dict[str, Any]
    resume_from: Path | None


def train(config: RunConfig) -> None:
    """Train what the configuration says, on the processes that were started.

    Raises UserError (a RankError once the ranks are connected, of which one rank speaks), and Stopped where it was
    asked to end early and has saved.
    """
    plan = make_plan(config, int(os.environ.get("WORLD_SIZE", "1")))
    faults = config.faults
    limits = Limits(faults.heartbeat_timeout_s, faults.progress_timeout_s, faults.slow_rank_factor)
    with distributed(pp=plan.pp, dp=plan.dp, tp=plan.tp, limits=limits) as (mesh, watch), ExitStack() as stack:
        run = _set_up(config, plan, mesh, stack)
        if run is None:
            return
        watch.write_to(run.folder / "faults")
        engine = Engine(config, plan, mesh)
        kernels = Kernels.parse(config.train.kernels)
        together(lambda: check_kernels(kernels, ops_used(config.model, kernels), engine.device.type))
        resumed = checkpoint.load(engine, run.resume_from) if run.resume_from else None
        done = resumed.step if resumed else 0
        with _reporter(run, engine, done) as report:
            if resumed:
                report.message(f"going on from {run.resume_from} after {done} steps")
                if resumed.data != run.data_identity:
                    report.message("note: its text was another one, or had another tokenizer: --data-path differs")
            notes = FaultNotes(run.folder, run.train_samples, run.tokenizer, writes=mesh.rank == 0)
            guard = Guard(engine, notes, report.message, partial(_training_batches, run))
            if resumed and run.resume_from:
                guard.go_on_from(resumed, run.resume_from)
            if guard.left_out:
                report.message(f"steps that are left out: {', '.join(map(str, guard.left_out))}")
            stopped = _loop(run, engine, report, watch, guard, done)
        if mesh.rank == 0:
            plot_runs([run.folder], run.folder / "loss.png")
            report.message(f"run folder: {run.folder} (loss curve: {run.folder / 'loss.png'})")
        engine.close()
    if stopped:
        raise Stopped(f"{stopped}; go on with: --load {run.folder}", speaks=mesh.rank == 0)


def _loop(run: Run, engine: Engine, report: Reporter, watch: Watch, guard: Guard, done: int) -> str | None:
    """All steps, or as many as there are until something asks to end: then returns what that was."""
    config, step = run.config, done
    newest = run.resume_from
    saver = Saver(engine, run.folder, config.checkpoint)
    stopper = Stopper(config.faults.exit_after_minutes, engine.device)
    stopped = None

    def last_checkpoint() -> Path | None:
        """Of this run as it goes now; what lies beside it may be of an earlier one."""
        saver.wait()
        saved = saver.finished()
        return saved.folder if saved else newest

    while step < config.train.train_steps:
        with watch.step(step + 1):
            result = guard.train_step(step)
        for note in watch.notes():
            report.message(f"step {step + 1} | {note}")
        loss_scale = result.loss_scale if config.train.precision == "fp16" else None
        report.step(
            step + 1, result.loss, result.lr, result.grad_norm, result.step_time_s, loss_scale, skipped=result.skipped
        )
        if back_to := guard.judge(step, result, last_checkpoint):
            step = _go_back(run, engine, report, guard, back_to)
            newest = back_to
            continue
        if config.debug.check_ranks:
            check_ranks(engine, step)
        stopped = stopper.agree(saver.failed)
        last = stopped is not None or step + 1 == config.train.train_steps
        validation_loss = None
        if run.valid_samples and not stopped and (last or _due(step + 1, config.log.eval_interval)):
            validation_loss, bits_per_byte = _validate(run, engine, run.valid_samples)
            report.validation(step + 1, validation_loss, bits_per_byte)
        if last or _due(step + 1, config.checkpoint.save_interval):
            saver.save(_state(run, engine, guard, step + 1, result.lr, validation_loss))
        if last:
            saver.wait()
        if saved := saver.finished():
            newest = saved.folder
            report.message(f"step {step + 1} | {saved}")
        if stopped:
            break
        step += 1
    stopper.release()
    return stopped


def _go_back(run: Run, engine: Engine, report: Reporter, guard: Guard, folder: Path) -> int:
    """Be as the run was when it saved this checkpoint; returns the steps that were done by then."""
    whole = find_whole(folder, True, report.message)
    state = checkpoint.load(engine, whole)
    guard.go_on_from(state, whole)
    report.go_back(state.step)
    return state.step


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _set_up(config: RunConfig, plan: Plan, mesh: Mesh, stack: ExitStack) -> Run | None:
    """Find the data, the checkpoint and the run folder: everything that can be missing, on any rank.

    stack: holds the run folder's lock. None where a run that may already be done (--auto-resume) is.
    """
    folder = [together(lambda: _make_run_folder(config, stack) if mesh.rank == 0 else Path())]
    dist.broadcast_object_list(folder, src=0)
    resume_from = _find_checkpoint(config, mesh)
    if resume_from and together(lambda: _check_resumable(config, resume_from)):
        if mesh.rank == 0:
            print(f"nothing to do: {resume_from} has done all {config.train.train_steps} steps")
        return None
    train_samples, valid_samples = together(lambda: _find_samples(config))
    together(lambda: _verify_data(config))
    tokenizer = together(lambda: tokenizer_for(config.data, parse_data_path(config.data.data_path)[0][1]))
    identity = together(lambda: _data_identity(config, tokenizer))
    together(lambda: _write_config(config, folder[0]) if mesh.rank == 0 else None)
    return Run(config, plan, mesh, folder[0], train_samples, valid_samples, tokenizer, identity, resume_from)


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


def _check_resumable(config: RunConfig, folder: Path) -> bool:
    """Whether nothing is left to do.  Raises UserError where this run cannot go on from there."""
    state = read_state(folder)
    check_resumable(config, state, folder)
    if state.step < config.train.train_steps:
        return False
    if config.checkpoint.auto_resume:
        return True
    raise UserError(f"{folder} has done {state.step} steps already; go on with a larger --train-steps")


def _find_samples(config: RunConfig) -> tuple[Samples, Samples | None]:
    batch = config.train.global_batch_size
    counts = (config.train.train_steps * batch, config.log.eval_steps * batch, 0)
    train_samples, valid_samples, _ = build_splits(
        config.data.data_path, config.data.split, config.model.seq_len, config.train.seed, counts
    )
    if train_samples is None:
        raise UserError(f"data.split={config.data.split} leaves nothing to train on; give it a first share above 0")
    return train_samples, valid_samples


def _verify_data(config: RunConfig) -> None:
    """Read all the data, where that is asked for: on one rank of each machine, which may have its own copy."""
    if config.data.verify and os.environ.get("LOCAL_RANK", "0") == "0":
        for _, prefix in parse_data_path(config.data.data_path):
            verify(prefix, config.model.vocab)


def _make_run_folder(config: RunConfig, stack: ExitStack) -> Path:
    """--save, else the run that --load goes on with, else a new folder under runs/; locked until `stack` closes."""
    wanted = config.checkpoint
    if wanted.save is None and wanted.load is not None:
        folder = folders.run_of(wanted.load)
        if not folders.checkpoints_of(folder):
            folders.find(wanted.load)  # raises, before anything is written
    else:
        folder = Path(wanted.save or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    goes_on = wanted.load is not None or wanted.auto_resume
    if not goes_on and (folder / "checkpoints").exists():
        raise UserError(f"{folder} holds a run already; go on with it by --load {folder}, or give another --save")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(folders.locked(folder))
        folders.mend(folder)
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder} ({error.strerror}); give another --save") from error
    return folder


def _write_config(config: RunConfig, folder: Path) -> None:
    try:
        replace_text(folder / "config.yaml", to_yaml(config))
    except OSError as error:
        raise UserError(
            f"cannot write {folder}/config.yaml ({error.strerror}); make room, or another --save"
        ) from error


def _reporter(run: Run, engine: Engine, done: int) -> Reporter:
    """What shows and records the run; on rank 0 it begins with the tables."""
    config, plan = run.config, run.plan
    device = torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu"
    report = Reporter(
        run.folder,
        train_steps=config.train.train_steps,
        start_step=done,
        batch_tokens=plan.batch_tokens,
        flops_per_token=plan.flops_per_token,
        peak_flops=metrics.peak_flops(device, config.train.precision),
        n_processes=plan.world_size,
        enabled=run.mesh.rank == 0,
        wandb_project=config.log.wandb_project,
        config=dataclasses.asdict(config),
        log_interval=config.log.log_interval,
    )
    report.show(config_table(config))
    report.show(plan_table(config, plan))
    kernels = Kernels.parse(config.train.kernels)
    report.show(kernel_table(kernel_rows(kernels, ops_used(config.model, kernels), engine.device.type)))
    report.message(f"optimizer: {engine.optimizer_name}")
    for dataset in sources(run.train_samples):
        if dataset.meta is None:
            report.message(
                f"note: {dataset.prefix} has no .json beside it, as preprocess_data.py writes it: of the index only "
                "the structure was checked, not the hash"
            )
    return report


def _training_batches(run: Run, step: int) -> Iterator[MicroBatch]:
    return _batches(run, run.train_samples, 0 if run.config.debug.overfit_one_batch else step)


def _batches(run: Run, samples: Samples, step: int) -> Iterator[MicroBatch]:
    return micro_batches(
        samples,
        run.config,
        step=step,
        dp_rank=run.mesh.data.rank,
        dp_size=run.mesh.data.size,
    )


def _validate(run: Run, engine: Engine, samples: Samples) -> tuple[float, float | None]:
    """Mean loss over eval_steps global batches, always the same ones; and bits per byte of their text."""
    eval_steps = run.config.log.eval_steps
    batches = (batch for step in range(eval_steps) for batch in _batches(run, samples, step))
    loss = engine.evaluate(batches, eval_steps * run.plan.micro_batches)
    if run.tokenizer is None or run.mesh.rank != 0:
        return loss, None
    labels = np.concatenate([samples[i][1:] for i in range(eval_steps * run.config.train.global_batch_size)])
    n_bytes = int(run.tokenizer.token_bytes()[labels].sum())
    return loss, metrics.bits_per_byte(loss, len(labels), n_bytes)


def _state(run: Run, engine: Engine, guard: Guard, step: int, lr: float, validation_loss: float | None) -> State:
    samples = step * run.config.train.global_batch_size
    plan = run.plan
    return State(
        step=step,
        samples=samples,
        tokens=samples * run.config.model.seq_len,
        lr=lr,
        counters=read_counters(engine),
        config=dataclasses.asdict(run.config),
        data=run.data_identity,
        layout={"tp": plan.tp, "pp": plan.pp, "dp": plan.dp, "zero_stage": plan.zero_stage},
        skipped_steps=guard.left_out,
        guard=guard.state,
        validation_loss=validation_loss,
    )


def _data_identity(config: RunConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Which text this run reads, and by which tokenizer."""
    blend = parse_data_path(config.data.data_path)
    return {
        "data_path": list(config.data.data_path),
        "index_sha256": [sha256_of(Path(f"{prefix}.idx")) for _, prefix in blend],
        "split": config.data.split,
        "tokenizer_sha256": tokenizer.sha256 if tokenizer else None,
    }
