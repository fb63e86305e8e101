"""The picture of a run: what is drawn is seen in matplotlib's own objects, what is written by its decoder."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from megagpt.errors import UserError
from megagpt.train.plot import draw_loss_curve, draw_run, labels_of, plot_runs, series, smooth

REPOSITORY = Path(__file__).parents[2]


def make_run(folder: Path, steps: int = 50, tokens: int = 4096) -> Path:
    folder.mkdir(parents=True)
    rows = [{"step": s, "tokens": s * tokens, "loss": 2 + 8 / s} for s in range(1, steps + 1)]
    rows += [{"step": steps, "tokens": steps * tokens, "validation_loss": 2.5, "bits_per_byte": 1.2}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def plot_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "tools" / "plot_run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=60, check=False)


@pytest.mark.parametrize("x_axis", ["step", "tokens"])
@pytest.mark.parametrize("log_x", [False, True])
def test_pictures_of_one_run_and_of_two(tmp_path, x_axis, log_x):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", steps=80)
    plot_runs([a], tmp_path / "one.png", x_axis=x_axis, log_x=log_x)
    plot_runs([a, b / "metrics.jsonl"], tmp_path / "two.png", x_axis=x_axis, log_x=log_x)
    one, two = imread(tmp_path / "one.png"), imread(tmp_path / "two.png")
    assert one.shape == two.shape == (750, 1200, 4)
    assert one.std() > 0.01
    orange = np.array([1.0, 127 / 255, 14 / 255])  # the second colour of tab10: the second run
    assert not (np.abs(one[..., :3] - orange).max(-1) < 0.02).any()
    assert (np.abs(two[..., :3] - orange).max(-1) < 0.02).any()


def test_the_curves_hold_the_rows(tmp_path):
    rows = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": None}, {"step": 2, "validation_loss": 8.0}]
    axes = Figure().subplots()
    draw_run(axes, rows, "step", (0, 0, 1), None)
    raw, smoothed, validation = axes.get_lines()
    np.testing.assert_array_equal(np.asarray(raw.get_xdata()), [1, 2])
    np.testing.assert_array_equal(np.asarray(raw.get_ydata()), [9.0, math.nan])
    assert smoothed.get_label() == "training (smoothed)"
    assert (list(validation.get_xdata()), list(validation.get_ydata())) == ([2], [8.0])
    assert [text.get_text() for text in axes.texts] == ["8.000"]
    assert series(rows, "step", "bits_per_byte") == ([], [])


def test_smoothing_keeps_a_line_and_averages_noise():
    line = np.linspace(9, 3, 301)
    np.testing.assert_allclose(smooth(line)[:-6], line[:-6], rtol=1e-12)  # no lag
    noise = np.random.default_rng(0).normal(size=1000)
    assert np.std(smooth(noise)) < 0.3  # 1 / sqrt(41) for a window of 41
    gap = smooth([1.0, math.nan, 3.0, 5.0])
    assert gap == pytest.approx([1.0, 2.0, 4.0, 4.0])
    assert math.isnan(smooth([math.nan, 1.0])[0])


def test_labels_tell_runs_apart(tmp_path):
    assert labels_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert labels_of([tmp_path / "x" / "run", tmp_path / "y" / "run"]) == ["x/run", "y/run"]
    assert labels_of([tmp_path / "a", tmp_path / "a"]) == ["a", "a"]


def test_the_tool_writes_into_the_run_or_where_it_is_told(tmp_path):
    run = make_run(tmp_path / "a")
    done = plot_tool(run)
    assert (done.returncode, done.stdout) == (0, f"wrote {run / 'loss.png'}\n")
    assert imread(run / "loss.png").shape == (750, 1200, 4)
    done = plot_tool(run, make_run(tmp_path / "b"), "--out", tmp_path / "both.svg", "--x", "tokens", "--log-x")
    assert done.returncode == 0
    assert "<svg" in (tmp_path / "both.svg").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory; give the folder of a run"),
        (b"", "has no training loss in it"),
        (b'{"step": 1, "tokens": 1, "loss": 1}\n{"st\n{"step": 2}\n', "line 2: got '{\"st'"),
        (b"\x89PNG\n", "line 1: got '\ufffdPNG'"),
    ],
)
def test_bad_runs_cost_one_line_and_leave_the_picture(tmp_path, content, message):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_bytes(content)
    (tmp_path / "loss.png").write_text("the earlier one")
    done = plot_tool(tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert str(tmp_path / "metrics.jsonl") in done.stderr
    assert message in done.stderr
    assert (tmp_path / "loss.png").read_text() == "the earlier one"


@pytest.mark.parametrize("out", ["missing/loss.png", "loss.nonsense"])
def test_an_out_that_cannot_be_written(tmp_path, out):
    with pytest.raises(UserError, match=r"cannot write .*loss\..*; name another file"):
        plot_runs([make_run(tmp_path / "a")], tmp_path / out)


def test_a_picture_that_cannot_be_drawn_is_no_error(tmp_path):
    run = make_run(tmp_path / "run")
    assert draw_loss_curve(run) == f"loss curve: {run}/loss.png"
    (run / "loss.png").unlink()
    (run / "loss.png").mkdir()
    assert draw_loss_curve(run).startswith(f"no loss curve: cannot write {run}/loss.png: ")
    (run / "metrics.jsonl").write_text("")
    assert draw_loss_curve(run).startswith(f"no loss curve: {run}/metrics.jsonl has no training loss in it")
