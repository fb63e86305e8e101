"""What a run shows and leaves: read back with TensorBoard's own reader, and with a terminal's eyes."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import sys
import time
import types
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megagpt.config import ModelConfig, RunConfig, TrainConfig
from megagpt.errors import UserError
from megagpt.schedule import Schedule
from megagpt.train import metrics_file
from megagpt.train.report import Reporter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def reporter(run_dir: Path, out: io.StringIO | None = None, **changes) -> Reporter:
    settings = {
        "start_step": 0,
        "flops_per_token": 6e6,
        "peak_flops": None,
        "n_processes": 4,
        "enabled": True,
        "wandb_project": None,
        "config": {"model": {"n_layers": 4}},
    } | changes
    train = {"train_steps": settings.pop("train_steps", 10), "global_batch_size": 8, **settings.pop("train", {})}
    settings["schedule"] = Schedule(RunConfig(model=ModelConfig(seq_len=125), train=TrainConfig(**train)))
    out = out or io.StringIO()
    width = settings.pop("width", 200)
    return Reporter(run_dir, console=Console(file=out, force_terminal=out.isatty(), width=width), **settings)


def take_steps(report: Reporter, first: int, last: int, step_time_s: float = 0.5) -> None:
    for step in range(first, last + 1):
        report.step(step, loss=5.0 / step, lr=1e-3, grad_norm=0.7, step_time_s=step_time_s)


def without_times(text: str) -> list[str]:
    """The lines, each of which begins with the time."""
    lines = text.splitlines()
    assert all(re.match(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines), lines
    return [line[20:] for line in lines]


def rows_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_file_has_a_row_a_step_with_every_bit(tmp_path):
    before = time.time()
    with reporter(tmp_path) as report:
        report.step(1, loss=0.1 + 0.2, lr=1 / 3, grad_norm=math.pi, step_time_s=9.0)
        report.validation(1, loss=math.log(50), bits_per_byte=2.5)
        report.step(2, loss=math.nan, lr=1e-3, grad_norm=math.inf, step_time_s=0.5, loss_scale=65536.0, skipped=True)
    rows = rows_of(tmp_path)
    assert all(before <= row.pop("time") <= time.time() for row in rows)
    first, validation, second = rows
    assert first == {
        "step": 1, "tokens": 1000, "loss": 0.1 + 0.2, "lr": 1 / 3, "grad_norm": math.pi, "step_time_s": 9.0
    }  # fmt: skip
    assert validation == {
        "step": 1, "tokens": 1000, "validation_loss": math.log(50),
        "perplexity": pytest.approx(50), "bits_per_byte": 2.5,
    }  # fmt: skip
    assert (second["loss"], second["grad_norm"]) == (None, None)  # JSON has no NaN
    assert (second["loss_scale"], second["skipped"]) == (65536.0, True)


def test_rates_are_means_over_a_window_without_the_first_step(tmp_path):
    with reporter(tmp_path, peak_flops=1e10, train_steps=100) as report:
        report.step(1, loss=5.0, lr=1e-3, grad_norm=1.0, step_time_s=60.0)  # compiles
        report.step(2, loss=5.0, lr=1e-3, grad_norm=1.0, step_time_s=0.4)
        report.validation(2, loss=5.0, bits_per_byte=None)
        report.step(3, loss=5.0, lr=1e-3, grad_norm=1.0, step_time_s=0.6)
        take_steps(report, 4, 43, step_time_s=0.25)
    rows = [row for row in rows_of(tmp_path) if "loss" in row]
    assert "tokens_per_s" not in rows[0]
    assert rows[2]["tokens_per_s"] == pytest.approx(1000 / 0.5)
    assert rows[2]["tflops_per_process"] == pytest.approx(2000 * 6e6 / 4 / 1e12)
    assert rows[2]["mfu"] == pytest.approx(2000 * 6e6 / (4 * 1e10))
    assert rows[-1]["tokens_per_s"] == pytest.approx(4000)  # the slow ones have left the window


def test_the_first_step_after_a_resume_is_no_measure_either(tmp_path):
    with reporter(tmp_path, start_step=7) as report:
        report.step(8, loss=5.0, lr=1e-3, grad_norm=1.0, step_time_s=60.0)
        report.step(9, loss=5.0, lr=1e-3, grad_norm=1.0, step_time_s=0.5)
    assert [row.get("tokens_per_s") for row in rows_of(tmp_path)] == [None, 2000.0]


def test_resume_drops_what_comes_again(tmp_path):
    with reporter(tmp_path) as report:
        take_steps(report, 1, 4)
        report.validation(4, loss=1.0, bits_per_byte=1.0)
        take_steps(report, 5, 6)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # as a killed process leaves it
    with reporter(tmp_path, start_step=4) as report:
        take_steps(report, 5, 10)
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))
    assert [row["step"] for row in rows if "validation_loss" in row] == [4]
    assert not list(tmp_path.glob("*.partial"))


def test_going_back_drops_what_comes_again(tmp_path):
    with reporter(tmp_path) as report:
        take_steps(report, 1, 6)
        report.go_back(4)
        take_steps(report, 5, 8, step_time_s=0.25)
    assert [(row["step"], row["step_time_s"]) for row in rows_of(tmp_path)][3:] == [(4, 0.5)] + [
        (step, 0.25) for step in range(5, 9)
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))


def test_a_step_that_was_left_out_is_no_measure(tmp_path):
    with reporter(tmp_path) as report:
        take_steps(report, 1, 3)
        report.step(4, loss=math.nan, lr=1e-3, grad_norm=math.nan, step_time_s=0.0, skipped=True)
        take_steps(report, 5, 5)
    assert [row.get("tokens_per_s") for row in rows_of(tmp_path)][1:] == [2000.0] * 4


def test_a_new_run_in_an_old_folder_starts_over(tmp_path):
    """As --auto-resume does where a run died before its first checkpoint."""
    for last in (7, 3):
        with reporter(tmp_path) as report:
            take_steps(report, 1, last, step_time_s=last)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/step_time_s")] == [(1, 3), (2, 3), (3, 3)]


def test_damaged_lines_are_set_aside_with_a_note(tmp_path):
    """A log is no reason to stop."""
    bad = [b'{"step": 2, "lo', b"\0" * 30, b"\xff\xfe", b"[1]", b'{"step": true}']
    kept, later = b'{"step": 1, "loss": 2.0}', b'{"step": 3, "loss": 1.0}'
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\n".join([kept, *bad, later, b'{"step": 4']))
    said: list[str] = []
    file = metrics_file.open_from(path, 1, said.append)
    file.append(metrics_file.to_line({"step": 2, "loss": math.nan}).encode())
    file.close()
    assert [row["step"] for row in metrics_file.read_rows(path)] == [1, 2]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == b"".join(line + b"\n" for line in bad)
    assert said == [f"note: {path}: 5 damaged lines, the first line 2, are now in {path}.damaged"]
    metrics_file.open_from(path, 2, said.append).close()
    assert len(said) == 1


def test_what_is_linked_to_is_not_written_to(tmp_path):
    elsewhere, path = tmp_path / "elsewhere", tmp_path / "metrics.jsonl"
    elsewhere.write_text('{"step": 1}\n{"step": 2}\n')
    path.symlink_to(elsewhere)
    file = metrics_file.open_from(path, 1)
    file.append(metrics_file.to_line({"step": 2}).encode())
    file.close()
    assert not path.is_symlink() and len(metrics_file.read_rows(path)) == 2
    assert elsewhere.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_pipe_in_its_place_is_refused(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl .*not a regular file"):
        reporter(tmp_path)


def test_tensorboard_reads_it_and_resume_purges(tmp_path):
    with reporter(tmp_path) as report:
        take_steps(report, 1, 6)
        report.validation(6, loss=1.5, bits_per_byte=2.0)
    with reporter(tmp_path, start_step=4) as report:
        take_steps(report, 5, 8, step_time_s=0.25)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == list(range(1, 9))
    assert [event.value for event in losses] == pytest.approx([5.0 / step for step in range(1, 9)])
    assert "validation/loss" in events.Tags()["scalars"]
    assert events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode().startswith("    {")


def test_plain_lines_are_thinned_and_carry_no_control_codes(tmp_path, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    with reporter(tmp_path, out, train_steps=500, width=40) as report:
        take_steps(report, 1, 500)
        report.message("[bold]done[/bold]")
    lines = without_times(out.getvalue())
    assert lines[0] == "step 1/500 | loss 5.0000 | lr 1.00e-03 | grad norm 0.7"
    assert lines[-2] == (
        "step 500/500 | loss 0.0100 | 0:00 left | 2k tokens/s | lr 1.00e-03 | grad norm 0.7 | 0.003 TFLOP/s each"
    )
    assert lines[-1] == "[bold]done[/bold]"
    assert len(lines) < 10  # 500 steps in far less than 10 s
    assert "\x1b" not in out.getvalue()


def test_slow_plain_lines_are_all_shown_at_the_log_interval(tmp_path, monkeypatch):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("megagpt.train.report.time.monotonic", lambda: next(clock))
    out = io.StringIO()
    with reporter(tmp_path, out, log_interval=4) as report:
        take_steps(report, 1, 10)
    assert [line.split()[1] for line in without_times(out.getvalue())] == ["1/10", "4/10", "8/10", "10/10"]


def test_a_terminal_gets_one_live_line(tmp_path):
    out = Terminal()
    with reporter(tmp_path, out, peak_flops=1e10, n_processes=1, train_steps=8) as report:
        take_steps(report, 1, 7)
        report.validation(7, loss=math.log(50), bits_per_byte=2.5)
        take_steps(report, 8, 8)
    screen = out.getvalue()
    assert "8/8  loss 0.6250  0:00 left  2k tokens/s  lr 1.00e-03  grad norm 0.7  0.012 TFLOP/s  MFU 120.0%" in screen
    assert "step 7 | validation loss 3.9120 | perplexity 50 | 2.500 bits per byte" in screen
    assert screen.count("\n") == 2  # the validation's, and the live line's own at the end


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_cuts_the_line_instead_of_wrapping(tmp_path, width):
    out = Terminal()
    with reporter(tmp_path, out, width=width) as report:
        take_steps(report, 1, 10)
    assert out.getvalue().count("\n") == 1
    assert "10/10  loss 0.5000" in out.getvalue()
    assert "━" * (4 if width == 40 else 16) in out.getvalue()  # the bar is still there


def test_other_ranks_do_nothing(tmp_path):
    out = io.StringIO()
    with reporter(tmp_path / "run", out, enabled=False, wandb_project="p") as report:
        take_steps(report, 1, 3)
        report.validation(3, loss=1.0, bits_per_byte=1.0)
        report.message("hello")
    assert out.getvalue() == ""
    assert not (tmp_path / "run").exists()


def test_wandb_missing_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'megagpt\[wandb\]'"):
        reporter(tmp_path, wandb_project="gpt")


@pytest.fixture
def wandb(monkeypatch) -> types.SimpleNamespace:
    """A stand-in for Weights & Biases: how runs were started, what they got, and what is to go wrong."""
    seen = types.SimpleNamespace(started=[], logged=[], problem=None)

    def log(values: dict) -> None:
        if seen.problem:
            raise seen.problem
        seen.logged.append(values)

    def init(**settings) -> types.SimpleNamespace:
        seen.started.append(settings)
        run = types.SimpleNamespace(log=log, axes={}, finish=lambda: seen.logged.append("finished"))
        run.define_metric = lambda name, step_metric=None: run.axes.update({name: step_metric})
        seen.run = run
        return run

    module = types.ModuleType("wandb")
    module.init = init  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "wandb")
    return seen


def test_wandb_gets_what_tensorboard_gets(tmp_path, wandb):
    with reporter(tmp_path, wandb_project="gpt") as report:
        take_steps(report, 1, 3)
        report.go_back(1)
        take_steps(report, 2, 2)
    assert wandb.started[0]["project"] == "gpt"
    assert wandb.started[0]["config"] == {"model": {"n_layers": 4}}
    assert wandb.run.axes == {"step": None, "*": "step"}  # its own count would drop steps that come again
    assert [(values["step"], values["train/loss"]) for values in wandb.logged[:-1]] == [
        (1, 5.0), (2, 2.5), (3, 5 / 3), (2, 2.5)
    ]  # fmt: skip
    assert wandb.logged[-1] == "finished"


def test_a_wandb_run_is_that_of_one_folder_until_it_starts_over(tmp_path, wandb):
    for folder, start_step in (("a/base", 0), ("b/base", 0), ("a/base", 2), ("a/base", 0)):
        reporter(tmp_path / folder, wandb_project="gpt", start_step=start_step).close()
    first, other, resumed, anew = (settings["id"] for settings in wandb.started)
    assert resumed == first and len({first, other, anew}) == 3
    assert {settings["name"] for settings in wandb.started} == {"base"}


def test_wandb_ends_no_run(tmp_path, wandb):
    out = io.StringIO()
    with reporter(tmp_path, out, wandb_project="gpt") as report:
        wandb.problem = ConnectionError("no way")
        take_steps(report, 1, 3)
    assert out.getvalue().count("Weights & Biases failed, and gets no more: ConnectionError: no way") == 1
    assert len(rows_of(tmp_path)) == 3


class Disk:
    """A raw file on a disk that has room for `room` bytes still."""

    def __init__(self, file: io.FileIO) -> None:
        self.file, self.room = file, 10**9

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        n_bytes = self.file.write(data[: self.room])
        self.room -= n_bytes
        return n_bytes

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def test_a_full_disk_ends_no_run_and_loses_no_row(tmp_path):
    out = io.StringIO()
    with reporter(tmp_path, out) as report:
        files = [report._file, report._tensorboard]
        for file in files:
            file._file = Disk(file._file)
        take_steps(report, 1, 2)
        for file in files:
            file._file.room = 30  # of a row
        take_steps(report, 3, 5)
        assert [row["step"] for row in rows_of(tmp_path)] == [1, 2], "half a row was left"
        for file in files:
            file._file.room = 10**9
        take_steps(report, 6, 7)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6, 7]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6, 7]
    notes = [line for line in without_times(out.getvalue()) if line.startswith("note: ")]
    assert len(notes) == 4, notes
    assert notes[0] == (
        f"note: {tmp_path}/metrics.jsonl cannot be written (No space left on device): training goes on, its rows wait"
    )
    assert notes[2] == f"note: {tmp_path}/metrics.jsonl is written again, with what had waited"


def test_what_cannot_be_opened_again_ends_no_run(tmp_path, monkeypatch):
    out = io.StringIO()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with reporter(tmp_path, out) as report:
        take_steps(report, 1, 3)
        monkeypatch.setattr("megagpt.train.metrics_file.open_from", full)
        monkeypatch.setattr("megagpt.train.event_file.EventFile", full)
        report.go_back(1)
        take_steps(report, 2, 2)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 2]
    assert out.getvalue().count("No space left on device") == 2


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the run folder .*--save"):
        reporter(tmp_path / "file" / "run")


@pytest.mark.parametrize("line", ["[1]", '{"loss": 1.0}', '{"step": "1"}', "nonsense", "[" * 100_000, ""])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + "\n" + '{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: "):
        metrics_file.read_rows(path)


def test_a_file_that_is_no_text_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\xff\n')
    with pytest.raises(UserError, match="line 2: got '\ufffd'"):
        metrics_file.read_rows(path)
