"""The loss curves of runs as a picture, from their metrics.jsonl.

One colour a run: training smoothed over its faint raw values, validation as a dashed line with dots.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from megagpt.errors import UserError
from megagpt.files import open_own
from megagpt.train import metrics_file

XAxis = Literal["step", "tokens"]


def draw_loss_curve(run: Path) -> str:
    """Draw RUN/loss.png, and say so; or why not, since no picture is worth a run's end."""
    picture = run / "loss.png"
    try:
        plot_runs([run], picture)
    except UserError as error:
        return f"no loss curve: {error}"
    return f"loss curve: {picture}"


def plot_runs(runs: Sequence[Path], out: Path, *, x_axis: XAxis = "step", log_x: bool = False) -> None:
    """Draw the loss of every run (its folder, or its metrics.jsonl) into out; the ending names the format.

    Raises UserError for a run without a readable metrics.jsonl, one with no loss in it, or an out that
    cannot be written.
    """
    paths = [run if run.is_file() else run / metrics_file.NAME for run in runs]
    names = labels_of([path.parent if path.name == metrics_file.NAME else path for path in paths])
    rows_of_runs = [metrics_file.read_rows(path) for path in paths]  # all are read before anything is drawn

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.subplots()
    colours = colormaps["tab10"].colors  # pyright: ignore[reportAttributeAccessIssue] # a ListedColormap
    for index, (path, name, rows) in enumerate(zip(paths, names, rows_of_runs, strict=True)):
        if not any(row.get("loss") is not None for row in rows):
            raise UserError(f"{path} has no training loss in it; wait for the run's first step")
        draw_run(axes, rows, x_axis, colours[index % len(colours)], name if len(runs) > 1 else None)
    dress(axes, x_axis, log_x, title=names[0] if len(runs) == 1 else None)
    picture = io.BytesIO()
    try:
        figure.savefig(picture, format=out.suffix[1:])
        with open_own(out, "wb") as file:
            file.write(picture.getbuffer())
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise UserError(f"cannot write {out}: {error}; name another file ending in .png, .svg or .pdf") from None


def draw_run(axes: Axes, rows: list[metrics_file.Row], x_axis: XAxis, colour, name: str | None) -> None:
    """One run: its two curves, and the last validation loss as a number at its end."""
    x, loss = series(rows, x_axis, "loss")
    axes.plot(x, loss, color=colour, alpha=0.25, linewidth=0.8)
    axes.plot(x, smooth(loss), color=colour, linewidth=1.6, label=name or "training (smoothed)")
    x, loss = series(rows, x_axis, "validation_loss")
    if not x:
        return
    dark = [0.7 * channel for channel in colour]
    label = None if name else "validation"
    axes.plot(x, loss, color=dark, linewidth=1.3, linestyle="--", marker="o", markersize=4, label=label)
    axes.annotate(
        f"{loss[-1]:.3f}", (x[-1], loss[-1]), xytext=(7, 0), textcoords="offset points",
        color=dark, va="center", fontsize=9, annotation_clip=False,
    )  # fmt: skip


def dress(axes: Axes, x_axis: XAxis, log_x: bool, title: str | None) -> None:
    """Title, axis labels, grid, legend."""
    axes.set_title(title or "Loss by run")
    axes.set_xlabel("training step" if x_axis == "step" else "training tokens")
    axes.set_ylabel("loss (nats per token)")
    if log_x:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    if title is None:
        handles.append(Line2D([], [], color="0.3", linestyle="--", marker="o", markersize=4, label="validation"))
    axes.legend(handles=handles, frameon=False)


def series(rows: list[metrics_file.Row], x_axis: XAxis, name: str) -> tuple[list[int], list[float]]:
    """x and y of the rows that have `name`; NaN, which stands as null, leaves a gap."""
    chosen = [row for row in rows if name in row]
    return [row[x_axis] for row in chosen], [math.nan if row[name] is None else row[name] for row in chosen]


def smooth(values: Sequence[float]) -> list[float]:
    """Mean over 4% of the run around each step.

    The window is centred, so that it does not lag, and narrows at the start, where the loss falls steeply.
    """
    raw = np.asarray(values, dtype=float)
    finite = np.isfinite(raw)
    totals = np.concatenate([[0.0], np.cumsum(np.where(finite, raw, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    i = np.arange(len(raw))
    half = np.minimum(max(1, len(raw) // 50), i)
    low, high = i - half, np.minimum(i + half + 1, len(raw))
    with np.errstate(invalid="ignore"):  # 0 / 0: nothing finite in a window is a gap
        return ((totals[high] - totals[low]) / (counts[high] - counts[low])).tolist()


def labels_of(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, with as many folders above it as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    different = len(set(parts))
    depths = range(1, max(map(len, parts)) + 1)
    depth = next(d for d in depths if len({p[-d:] for p in parts}) == different)
    return ["/".join(p[-depth:]) for p in parts]
