"""The figures of benchmarks/kernels.py as tables and as a picture.

    python -m benchmarks.kernels_shown FILE.json FILE.png

draws figures that another machine has written: what --json of kernels.py gave, or gpu_check.py.
"""

from __future__ import annotations

import json
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks.kernels import OURS, PASSES, Measured, Row
from megagpt.errors import UserError, run_cli

# Okabe and Ito's colours, told apart by every eye, and a marker each for print.
LOOKS = {
    OURS: ("#0072B2", "o", "our kernel"),
    "eager": ("#E69F00", "s", "PyTorch eager"),
    "compile": ("#009E73", "^", "torch.compile"),
}
PEER_LOOKS = (("#CC79A7", "D"), ("#D55E00", "v"), ("#56B4E9", "P"), ("#000000", "X"))


class Screen:
    """Tables on the terminal, each as soon as its op is done."""

    def __init__(self, headline: str) -> None:
        self.console = Console(width=100)
        self.console.print(headline, highlight=False)

    def busy(self, op: str) -> AbstractContextManager[Any]:
        """Something that moves while an op is measured."""
        return self.console.status(op)

    def show(self, measured: Measured) -> None:
        """One op."""
        for row in measured.rows:
            self.console.print(table(measured.op, row))
            for name, why in row["failed"].items():
                self.console.print(f"[bold]{name} failed[/]: {why}\n", highlight=False)
        if not measured.rows:
            self.console.print(f"{measured.op}: no shape of it is for this device\n")

    def end(self, all_measured: list[Measured]) -> None:
        """What holds for all of them."""
        copies = [speed for measured in all_measured for speed in measured.copy_gb_per_s.values()]
        self.console.print(f"a copy: {min(copies):.1f} to {max(copies):.1f} GB/s", highlight=False)
        missing = sorted({package for measured in all_measured for package in measured.not_installed})
        if missing:
            self.console.print(f"not installed: {', '.join(missing)}", highlight=False)


def table(op: str, row: Row) -> Table:
    """One shape and dtype; a line for each implementation."""
    shown = Table(title=f"{op}: {row['shape']}, {row['dtype']}", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("", no_wrap=True)
    for which in PASSES:
        for heading in (f"{which}\nms", "\nmin", "\nGB/s", "of\ncopy", "time /\nours"):
            shown.add_column(heading, justify="right", no_wrap=True)
    for name in dict.fromkeys(name for which in PASSES for name in row[which]["implementations"]):
        cells = [cell for which in PASSES for cell in _cells(row[which]["implementations"].get(name))]
        shown.add_row(name, *cells, style="bold" if name == OURS else "")
    return shown


def _cells(summary: dict[str, Any] | None) -> list[str]:
    if summary is None:
        return [""] * 5
    ratio = summary.get("time_over_ours")
    return [
        f"{summary['median_s'] * 1e3:.3f}",
        f"{summary['min_s'] * 1e3:.3f}",
        f"{summary['gb_per_s']:.1f}",
        f"{summary['share_of_copy']:.0%}",
        f"{ratio:.2f}" if ratio else "",
    ]


def plot(figures: dict[str, Any], out: Path) -> None:
    """A dot for each implementation's share of copy bandwidth: a line per op, shape and dtype, a panel per pass.

    Raises UserError for a file that cannot be written.
    """
    rows = [(op["op"], row) for op in figures["ops"] for row in op["rows"]]
    figure = Figure(figsize=(11, 1.9 + 0.4 * len(rows)), dpi=90, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True, squeeze=False)[0]
    names = list(dict.fromkeys(name for _, row in rows for p in PASSES for name in row[p]["implementations"]))
    for axes, which in zip(panels, PASSES, strict=True):
        _draw(axes, [row[which]["implementations"] for _, row in rows], names)
        axes.set_title(which)
    panels[0].set_yticks(range(len(rows)), [f"{op}: {row['shape']}, {row['dtype']}" for op, row in rows], fontsize=9)
    panels[0].set_ylim(len(rows) - 0.4, -0.6)  # the first on top
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    machine = figures["machine"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(f"Share of copy bandwidth ({where}; more is better)", fontsize=12)
    try:
        figure.savefig(out)
    except (OSError, ValueError) as error:  # ValueError: an ending that matplotlib does not know
        raise UserError(f"cannot write {out}: {error}; name another file ending in .png, .svg or .pdf") from None


def _draw(axes: Axes, rows: list[dict[str, Any]], names: list[str]) -> None:
    peers = [name for name in names if name not in LOOKS]
    looks = LOOKS | {name: (*PEER_LOOKS[i % len(PEER_LOOKS)], name) for i, name in enumerate(peers)}
    for y in range(1, len(rows), 2):
        axes.axhspan(y - 0.5, y + 0.5, color="0.95", zorder=0)
    for i, name in enumerate(names):
        colour, marker, label = looks[name]
        height = (i + 0.5) / len(names) - 0.5  # one above the other, that none hides another
        points = [(row[name]["share_of_copy"], y + 0.8 * height) for y, row in enumerate(rows) if name in row]
        x, y = zip(*points, strict=True) if points else ((), ())
        axes.plot(x, y, linestyle="", color=colour, marker=marker, markersize=6, label=label, clip_on=False)
    axes.axvline(1.0, color="0.3", linewidth=1, linestyle="--", label="a copy", zorder=1)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("bytes that must move / time, in units of a copy's")
    axes.grid(True, axis="x", color="0.85", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def main() -> None:
    if len(sys.argv) != 3:
        raise UserError("got other than two arguments; wanted FILE.json FILE.png")
    figures = json.loads(Path(sys.argv[1]).read_text())
    figures |= figures.get("parts", {}).get("bench", {})  # of gpu_check.py
    plot(figures, Path(sys.argv[2]))


if __name__ == "__main__":
    run_cli(main)
