"""Training, read from top to bottom: start, steps, and what is left when they are done."""

from __future__ import annotations

import math
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from megagpt import metrics
from megagpt.checkpoint.load import find_whole
from megagpt.checkpoint.save import Saver
from megagpt.checkpoint.state import State
from megagpt.config import RunConfig, plain
from megagpt.data.loader import MicroBatch
from megagpt.errors import Stopped, UserError
from megagpt.model.ops_used import attention_status, check_kernels, kernel_rows, ops_used
from megagpt.plan.plan import make_plan
from megagpt.plan.table import config_table, plan_table
from megagpt.processes.agree import together
from megagpt.processes.launched import n_processes
from megagpt.processes.start import distributed
from megagpt.processes.stopping import Stopper
from megagpt.processes.watch.limits import Limits
from megagpt.processes.watch.watch import Watch
from megagpt.schedule import Schedule
from megagpt.train.faults.check_ranks import check_ranks
from megagpt.train.faults.guard import Guard
from megagpt.train.faults.notes import FaultNotes
from megagpt.train.report import Reporter, kernel_table
from megagpt.train.run import Run, batches_of, find_run
from megagpt.train.samples import write_samples
from megagpt.train.source import Source, Validation
from megagpt.train.step.engine import Engine, StepResult


def train(config: RunConfig, source: Source) -> None:
    """Train what the configuration says on what the source has, on the processes that were started.

    Raises UserError (a RankError once the ranks are connected, of which one rank speaks), and Stopped where it was
    asked to end early and has saved.
    """
    plan = make_plan(config, n_processes())
    with (
        distributed(pp=plan.pp, dp=plan.dp, tp=plan.tp, limits=_limits(config)) as (mesh, watch),
        Stopper(config.faults.exit_after_minutes) as stopper,
        ExitStack() as stack,
    ):
        run = find_run(config, source, plan, mesh, stack)
        if run is None:
            return
        watch.write_to(run.folder / "faults")
        engine = _start_engine(run)
        say = partial(print, flush=True) if mesh.rank == 0 else lambda _: None
        resumed = engine.load(run.resume_from, say) if run.resume_from else source.begin(run, engine, say)
        with _reporter(run, engine, resumed) as report:
            parts = _parts(run, engine, report, resumed)
            stopped = _loop(parts, watch, stopper, resumed.step if resumed else 0)
        if not stopped:
            source.end(run, engine)
        _finish(parts)
    if stopped:
        raise Stopped(f"{stopped}; go on with: --load {run.folder}", speaks=mesh.rank == 0)


def fail(config: RunConfig, error: UserError) -> NoReturn:
    """Meet the other ranks, whose first words to each other are whether they can train, and end all with this error."""
    tp, pp = config.parallel.tp, config.parallel.pp

    def tell() -> NoReturn:
        raise UserError(f"{socket.gethostname()}: {error}")

    with distributed(pp=pp, dp=n_processes() // (tp * pp), tp=tp, limits=_limits(config)):
        together(tell)
    raise AssertionError("one of them cannot")


def _limits(config: RunConfig) -> Limits:
    faults = config.faults
    return Limits(faults.heartbeat_timeout_s, faults.progress_timeout_s, faults.slow_rank_factor)


@dataclass(frozen=True)
class Parts:
    """What the loop is made of."""

    run: Run
    engine: Engine
    guard: Guard
    saver: Saver
    report: Reporter


def _loop(parts: Parts, watch: Watch, stopper: Stopper, step: int) -> str | None:
    """All steps after `step`, or as many as there are until something asks to end: then returns what that was."""
    config, guard, saver = parts.run.config, parts.guard, parts.saver
    while step < config.train.train_steps:
        with watch.step(step + 1):
            result = guard.train_step(step)
        _report_step(parts, step + 1, result, watch.notes())
        if back_to := guard.judge(step, result, saver.newest):
            step = _go_back(parts, back_to)
            continue
        if config.debug.check_ranks:
            check_ranks(parts.engine, step)
        step += 1
        stopped = stopper.agree(saver.failed, parts.engine.device)
        last = stopped is not None or step == config.train.train_steps
        validated = not stopped and (last or _due(step, config.log.eval_interval))
        validation = _validate(parts, step) if validated else None
        if not stopped and (last or _due(step, config.log.sample_interval)):
            _write_samples(parts, step)
        if last or _due(step, config.checkpoint.save_interval):
            saver.save(_state(parts, step, result.lr, validation))
        if saved := saver.finished(wait=last):
            parts.report.message(f"step {step} | {saved}")
        if stopped:
            return stopped
    return None


def _due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _start_engine(run: Run) -> Engine:
    # What a checkpoint may lack begins as in a new run.
    begin = run.resume_from is None or run.config.checkpoint.allow_missing
    engine, kernels = Engine(run.config, run.plan, run.mesh, begin), run.config.train.kernels
    together(lambda: check_kernels(kernels, ops_used(run.config.model, kernels), engine.device.type))
    return engine


def _parts(run: Run, engine: Engine, report: Reporter, resumed: State | None) -> Parts:
    """What guards, saves and reports, as the checkpoint knows it; and what is going to be trained, in words."""
    _say_what_runs(run, engine, report)
    if resumed:
        report.message(f"going on from {run.resume_from} after {resumed.step} steps")
    if run.mesh.rank == 0:
        for remark in run.source.remarks(run, engine.schedule, resumed):
            report.message(f"note: {remark}")
    notes = FaultNotes(run.folder, run.train_samples, run.tokenizer, writes=run.mesh.rank == 0)
    guard = Guard(engine, notes, report.message, partial(_training_batches, run, engine.schedule))
    if resumed and run.resume_from:
        guard.go_on_from(resumed, run.resume_from)
    if guard.left_out:
        report.message(f"steps that are left out: {', '.join(map(str, guard.left_out))}")
    saver = Saver(engine.masters, run.folder, run.config.checkpoint, run.resume_from)
    return Parts(run, engine, guard, saver, report)


def _reporter(run: Run, engine: Engine, resumed: State | None) -> Reporter:
    """What shows and records the run, on rank 0."""
    config, plan = run.config, run.plan
    device = torch.cuda.get_device_name() if engine.device.type == "cuda" else "cpu"
    return Reporter(
        run.folder,
        schedule=engine.schedule,
        start_step=resumed.step if resumed else 0,
        flops_per_token=plan.flops_per_token,
        peak_flops=metrics.peak_flops(device, config.train.precision),
        n_processes=plan.world_size,
        enabled=run.mesh.rank == 0,
        wandb_project=config.log.wandb_project,
        config=plain(config),
        log_interval=config.log.log_interval,
    )


def _say_what_runs(run: Run, engine: Engine, report: Reporter) -> None:
    config, kernels = run.config, run.config.train.kernels
    report.show(config_table(config))
    report.show(plan_table(config, run.plan))
    rows = kernel_rows(kernels, ops_used(config.model, kernels), engine.device.type)
    report.show(kernel_table([*rows, attention_status(config.model, kernels)]))
    report.message(f"optimizer: {engine.backend.optimizer_name}")
    for line in run.source.lines(run):
        report.message(line)


def _report_step(parts: Parts, step: int, result: StepResult, notes: list[str]) -> None:
    for note in notes:
        parts.report.message(f"step {step} | {note}")
    loss_scale = result.loss_scale if parts.run.config.train.precision == "fp16" else None
    parts.report.step(
        step,
        result.loss,
        result.lr,
        result.grad_norm,
        result.step_time_s,
        loss_scale,
        skipped=result.skipped,
        noise_scale_tokens=result.noise_scale_tokens,
    )


def _go_back(parts: Parts, folder: Path) -> int:
    """Be as the run was when it saved this checkpoint; returns the steps that were done by then."""
    whole = find_whole(folder, True, parts.report.message)
    state = parts.engine.load(whole)
    parts.guard.go_on_from(state, whole)
    parts.report.go_back(state.step)
    return state.step


def _validate(parts: Parts, step: int) -> Validation | None:
    """What the source finds; None where nothing is held out, and where it is not finite: such a one is never best."""
    found = parts.run.source.validate(parts.run, parts.engine, step)
    if found is None:
        return None
    parts.report.validation(step, found.loss, found.bits_per_byte, found.figures)
    return found if math.isfinite(found.loss) else None


def _write_samples(parts: Parts, step: int) -> None:
    if parts.run.config.log.sample_prompts:
        samples = write_samples(parts.engine, parts.run.tokenizer)
        parts.report.samples(step, samples)


def _training_batches(run: Run, schedule: Schedule, step: int) -> Iterator[MicroBatch]:
    return batches_of(run, run.train_samples, schedule.positions(step), schedule.seq_len(step))


def _state(parts: Parts, step: int, lr: float, validation: Validation | None) -> State:
    config, plan, engine = parts.run.config, parts.run.plan, parts.engine
    return State(
        step=step,
        samples=engine.schedule.samples_before(step),
        tokens=engine.schedule.tokens_before(step),
        lr=lr,
        counters=engine.counters,
        config=plain(config),
        data=parts.run.data_identity,
        layout={"tp": plan.tp, "pp": plan.pp, "dp": plan.dp, "zero_stage": plan.zero_stage},
        skipped_steps=parts.guard.left_out,
        guard=parts.guard.state,
        noise_scale=engine.noise.state if engine.noise else {},
        validation_loss=validation.loss if validation else None,
        validation_score=validation.score if validation else None,
        base_sha256=parts.run.base_sha256,
    )


def _finish(parts: Parts) -> None:
    """The loss curve beside the run's files, and the end of the engine."""
    folder = parts.run.folder
    if parts.run.mesh.rank == 0:
        from megagpt.train.plot import draw_loss_curve  # matplotlib takes a second, and only this rank needs it

        parts.report.message(f"run folder: {folder} ({draw_loss_curve(folder)})")
    parts.engine.close()
