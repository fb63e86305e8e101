"""What a run shows while it trains, and what it leaves in its folder.

On a terminal one live line; elsewhere plain lines, thinned, without control codes. Always metrics.jsonl and
TensorBoard; Weights & Biases where a project is named. Rates are means over a window of step times, so that
compilation, validation and saving never enter them.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from megagpt import metrics
from megagpt.console import console_here, show
from megagpt.errors import UserError
from megagpt.files import os_reason, replace_text
from megagpt.schedule import Schedule
from megagpt.train import metrics_file
from megagpt.train.appended import AppendedFile

if TYPE_CHECKING:
    from megagpt.train.event_file import EventFile
    from megagpt.train.samples import Sample

WINDOW_STEPS = 20
PLAIN_INTERVAL_S = 2.0


def kernel_table(rows: Iterable[tuple[str, str, str]]) -> Table:
    """Which implementation each op runs, and why."""
    table = Table(box=SIMPLE, title="ops", title_justify="left", show_header=False, pad_edge=False)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*row)
    return table


class Reporter:
    """Reports one run, on the rank that is `enabled`; on the others every method returns at once.

    start_step is the number of steps done before, and `step` counts the steps done, from 1: the first call
    is step(start_step + 1, ...). schedule, flops_per_token (forward and backward, of whole sequences) and n_processes
    are those of the whole job; peak_flops is of one device, or None.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        schedule: Schedule,
        start_step: int,
        flops_per_token: float,
        peak_flops: float | None,
        n_processes: int,
        enabled: bool,
        wandb_project: str | None,
        config: dict[str, Any],
        log_interval: int = 1,
        console: Console | None = None,
    ) -> None:
        """Opens (and creates) run_dir; drops what its metrics.jsonl says of steps after start_step.

        Raises UserError where metrics.jsonl cannot be written, and where wandb is asked for and not installed.
        """
        self._enabled = enabled
        if not enabled:
            return
        self._schedule, self._start_step, self._log_interval = schedule, start_step, log_interval
        self._train_steps, self._flops_per_token = schedule.train_steps, flops_per_token
        self._peak_flops, self._n_processes = peak_flops, n_processes
        self._measured: deque[tuple[int, float]] = deque(maxlen=WINDOW_STEPS)  # a step, and its time in seconds
        self._skipped = 0
        self._last_line_s = -math.inf
        self._console = console or console_here()
        self._run_dir = run_dir
        self._problems: dict[Path, str] = {}  # of files, as the user knows them

        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            self._wandb = _start_wandb(wandb_project, run_dir, config, start_step) if wandb_project else None
            self._file = metrics_file.open_from(run_dir / metrics_file.NAME, start_step, self.message)
        except OSError as error:
            raise UserError(f"cannot make the run folder {run_dir}: {os_reason(error)}; name another: --save") from None
        self._tensorboard = self._open_tensorboard(start_step)
        if self._tensorboard:
            self._tensorboard.add_text(start_step, "config", _as_markdown(config))
        self._progress = self._start_progress() if self._console.file.isatty() else None

    def step(
        self,
        step: int,
        loss: float,
        lr: float,
        grad_norm: float,
        step_time_s: float,
        loss_scale: float | None = None,
        skipped: bool = False,
        noise_scale_tokens: float | None = None,
    ) -> None:
        """One optimizer step is done; step_time_s is its own time, without validation or saving."""
        if not self._enabled:
            return
        if step > self._start_step + 1 and step_time_s > 0:  # the first one compiles and allocates; 0: left out
            self._measured.append((step, step_time_s))
        self._skipped += skipped
        row = {"step": step, "tokens": self._schedule.tokens_before(step), "loss": loss, "lr": lr}
        row |= {"grad_norm": grad_norm, "step_time_s": step_time_s, **self._rates()}
        if loss_scale is not None:
            row["loss_scale"] = loss_scale
        if noise_scale_tokens is not None:
            row["noise_scale_tokens"] = noise_scale_tokens
        if skipped:
            row["skipped"] = True
        self._record(row, prefix="train/")
        self._show(row)

    def validation(
        self, step: int, loss: float, bits_per_byte: float | None, figures: Mapping[str, float] | None = None
    ) -> None:
        """A validation after `step` steps. figures: what a task is measured by, where the loss is not of tokens."""
        if not self._enabled:
            return
        row = {"step": step, "tokens": self._schedule.tokens_before(step), "validation_loss": loss}
        if figures:
            self._record({**row, **figures}, prefix="validation/")
            shown = "".join(f" | {name} {value:.4f}" for name, value in figures.items())
            self.message(f"step {step} | validation loss {loss:.4f}{shown}")
            return
        perplexity = metrics.perplexity(loss)
        row |= {"perplexity": perplexity, "bits_per_byte": bits_per_byte}
        self._record(row, prefix="validation/")
        bits = "" if bits_per_byte is None else f" | {bits_per_byte:.3f} bits per byte"
        self.message(f"step {step} | validation loss {loss:.4f} | perplexity {perplexity:.4g}{bits}")

    def samples(self, step: int, samples: Sequence[Sample]) -> None:
        """What the model writes after `step` steps."""
        if not self._enabled:
            return
        self._append({"step": step, "samples": [asdict(sample) for sample in samples]})
        for sample in samples:
            self.message(f"step {step} | {sample.prompt!r} → {sample.text!r}")
        if self._tensorboard:
            self._tensorboard.add_text(step, "samples", "\n\n".join(f"**{s.prompt}**{s.text}" for s in samples))

    def go_back(self, step: int) -> None:
        """The run goes on from where it was after `step` steps; what was recorded of later ones is dropped."""
        if not self._enabled:
            return
        self._file.close()
        try:
            self._file = metrics_file.open_from(self._file.path, step, self.message)
        except (OSError, UserError) as error:
            self.message(f"note: {self._file.path} keeps what it had of the steps after {step} ({error})")
            self._file = AppendedFile(self._file.path)
        if self._tensorboard:
            self._tensorboard.close()
        self._tensorboard = self._open_tensorboard(step)

    def message(self, text: str) -> None:
        """Print a line that stays, above the live one, with the time."""
        if self._enabled:
            line = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
            self._console.print(line, soft_wrap=True, markup=False, highlight=False)

    def show(self, renderable: RenderableType) -> None:
        """Print a table, above the live line."""
        if self._enabled:
            show(self._console, renderable)

    def close(self) -> None:
        """End the live line and finish the files; messages still print."""
        if not self._enabled:
            return
        if self._progress:
            self._progress.stop()
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        self._to_wandb(lambda run: run.finish())

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _rates(self) -> dict[str, float]:
        """Speed over the window; empty until a step after the first is in it.

        FLOPs of a token are known for whole sequences: while any was shorter, there is no figure that has them in it.
        """
        if not self._measured:
            return {}
        schedule, steps = self._schedule, [step - 1 for step, _ in self._measured]
        lengths = [schedule.seq_len(step) for step in steps]
        tokens = sum(schedule.batch_size(step) * length for step, length in zip(steps, lengths, strict=True))
        tokens_per_s = metrics.tokens_per_s(tokens, sum(time_s for _, time_s in self._measured))
        if min(lengths) < schedule.phases[-1].seq_len:
            return {"tokens_per_s": tokens_per_s}
        flops = metrics.model_flops_per_s(tokens_per_s, self._flops_per_token)
        rates = {"tokens_per_s": tokens_per_s, "tflops_per_process": flops / self._n_processes / 1e12}
        if self._peak_flops:
            rates["mfu"] = metrics.mfu(flops, self._peak_flops, self._n_processes)
        return rates

    def _record(self, row: metrics_file.Row, prefix: str) -> None:
        self._append(row)
        values = {
            prefix + name.removeprefix("validation_"): value
            for name, value in row.items()
            if name not in {"step", "tokens"} and value is not None
        }
        if self._tensorboard:
            self._tensorboard.add_scalars(row["step"], values)
            self._tell_problem(self._tensorboard)
        self._to_wandb(lambda run: run.log({"step": row["step"], **values}))

    def _append(self, row: metrics_file.Row) -> None:
        self._file.append(metrics_file.to_line({**row, "time": time.time()}).encode())
        self._tell_problem(self._file)

    def _tell_problem(self, file: AppendedFile) -> None:
        """Say once that a file cannot be written, and once that it can again."""
        before = self._problems.pop(file.path, None)
        if file.problem:
            self._problems[file.path] = file.problem
        if file.problem and not before:
            self.message(f"note: {file.path} cannot be written ({file.problem}): training goes on, its rows wait")
        if before and not file.problem:
            self.message(f"note: {file.path} is written again, with what had waited")

    def _open_tensorboard(self, start_step: int) -> EventFile | None:
        """A writer of what follows start_step done steps; None, and a note, where there can be none."""
        from megagpt.train.event_file import EventFile  # TensorBoard takes a second, and only this rank needs it

        try:
            return EventFile(self._run_dir / "tensorboard", start_step)
        except OSError as error:
            self.message(
                f"note: {self._run_dir / 'tensorboard'} cannot be written ({os_reason(error)}): training goes on"
            )
            return None

    def _to_wandb(self, call: Callable[[Any], object]) -> None:
        """Do something with the Weights & Biases run, if there is one; one that fails is given up."""
        try:
            if self._wandb:
                call(self._wandb)
        except Exception as error:  # whatever it is, it is not the training's
            self._wandb = None
            self.message(f"note: Weights & Biases failed, and gets no more: {type(error).__name__}: {error}")

    def _start_progress(self) -> Progress:
        progress = Progress(
            BarColumn(bar_width=_BAR_WIDTH),
            TextColumn("{task.fields[line]}", markup=False),
            console=self._console,
            auto_refresh=False,  # a step refreshes it: no thread beside the training
        )
        self._task = progress.add_task("", total=self._train_steps, completed=self._start_step, line="")
        progress.start()
        return progress

    def _show(self, row: metrics_file.Row) -> None:
        """Refresh the live line, or print a plain one if one is due."""
        step = row["step"]
        first, last = step == self._start_step + 1, step == self._train_steps
        if not (first or last or step % self._log_interval == 0):
            return
        if self._progress:
            line = _fitting(self._words(row), self._console.width - _BAR_WIDTH - 1)
            self._progress.update(self._task, completed=step, line=line, refresh=True)
            return
        now_s = time.monotonic()
        if first or last or now_s - self._last_line_s >= PLAIN_INTERVAL_S:
            self._last_line_s = now_s
            self.message("step " + " | ".join(self._words(row)))

    def _words(self, row: metrics_file.Row) -> list[str]:
        """What a line says, the more important first: a narrow terminal cuts the end off."""
        words = [f"{row['step']}/{self._train_steps}", f"loss {row['loss']:.4f}"]
        if "tokens_per_s" in row:
            left_s = metrics.time_left_s(self._schedule.total_tokens - row["tokens"], row["tokens_per_s"])
            words += [f"{_clock(left_s)} left", f"{_short(row['tokens_per_s'])} tokens/s"]
        words += [f"lr {row['lr']:.2e}", f"grad norm {row['grad_norm']:.3g}"]
        if "tflops_per_process" in row:
            each = " each" if self._n_processes > 1 else ""
            words.append(f"{row['tflops_per_process']:.3g} TFLOP/s{each}")
        if "mfu" in row:
            words.append(f"MFU {row['mfu']:.1%}")
        if "noise_scale_tokens" in row:
            words.append(f"noise scale {_short(row['noise_scale_tokens'])} tokens")
        if "loss_scale" in row:
            words.append(f"loss scale {row['loss_scale']:g}")
        if self._skipped:
            words.append(f"skipped {self._skipped}")
        return words


_BAR_WIDTH = 16  # columns


def _fitting(words: list[str], width: int) -> str:
    """As many of the words as have room beside the bar, which a longer line would push out; the first one anyway."""
    line = words[0]
    for word in words[1:]:
        if len(line) + 2 + len(word) > width:
            break
        line += f"  {word}"
    return line


def _start_wandb(project: str, run_dir: Path, config: dict[str, Any], start_step: int) -> Any:
    """A Weights & Biases run of this folder's: a resumed one goes on with it, one from the start gets another.

    Steps are a figure like others, and the x-axis: Weights & Biases' own count takes no step twice, as a rewind needs.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError(f"log.wandb_project={project} needs wandb; run: pip install 'megagpt[wandb]'")
    wandb = importlib.import_module("wandb")  # an extra: most installations do not have it
    id_file = run_dir / "wandb-id"
    if start_step == 0 or not id_file.exists():
        replace_text(id_file, secrets.token_hex(8))
    name, run_id = run_dir.resolve().name, id_file.read_text(encoding="utf-8").strip()
    try:
        run = wandb.init(project=project, dir=str(run_dir), id=run_id, name=name, config=config, resume="allow")
    except Exception as error:  # no key, no network: of whatever class
        raise UserError(
            f"Weights & Biases does not start ({type(error).__name__}: {error}); run `wandb login`, set "
            "WANDB_MODE=offline, or leave out --log.wandb-project"
        ) from error
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


def _as_markdown(config: dict[str, Any]) -> str:
    """The configuration as TensorBoard's text tab shows it: an indented block is code."""
    return "\n".join("    " + line for line in json.dumps(config, indent=2, default=str).splitlines())


def _clock(seconds: float) -> str:
    """75 -> 1:15; 7300 -> 2:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(number: float) -> str:
    """1234567 -> 1.23M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"
