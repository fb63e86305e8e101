"""What a check shows: errors by source, the worst rows, which constants matter, scatter plots. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from megagpt.plan.check import Errors, is_seen, memory_ratios, sensitivity, summary, sweep_taus, time_ratios, timed
from megagpt.plan.job import Layout
from megagpt.plan.recommended import Recommended
from megagpt.plan.rows.row import Row, Skipped
from megagpt.plan.step import step_time

MARKS = ("<!-- plan-check -->", "<!-- /plan-check -->")


def sources_of(rows: Sequence[Row]) -> list[str]:
    """In the order of their first rows."""
    return list(dict.fromkeys(row.source for row in rows))


def error_cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """By source: rows, median, 90th percentile and bias in per cent; of rows the fit saw, the median; sick rows."""
    cells = []
    for source in sources_of(rows):
        ours = [row for row in rows if row.source == source]
        unseen = Errors.of(time_ratios(row for row in timed(ours) if not is_seen(row)))
        seen = Errors.of(time_ratios(row for row in timed(ours) if is_seen(row)))
        sick = sum(row.sick for row in ours)
        cells.append(
            (
                source,
                str(unseen.rows),
                _percent(unseen.median),
                _percent(unseen.p90),
                _signed(unseen.bias),
                str(seen.rows),
                _percent(seen.median),
                str(sick),
            )
        )
    return cells


ERROR_HEADINGS = ("source", "rows", "median %", "p90 %", "bias %", "fitted on", "median %", "sick")


def error_table(rows: Sequence[Row]) -> Table:
    """The same, to be shown."""
    title = "step time, predicted against measured: rows that the fit did not see, then those that it saw"
    return _table(title, ERROR_HEADINGS, error_cells(rows))


def tau_table(rows: Sequence[Row]) -> Table:
    """Rank correlation within each sweep."""
    taus = sweep_taus(timed(rows))
    return _table(
        "order of layouts within a sweep", ("sweep", "Kendall tau"), [(n, f"{t:.2f}") for n, t in taus.items()]
    )


def memory_table(rows: Sequence[Row]) -> Table:
    """Errors of the memory of a rank, by source."""
    cells = []
    for source in sources_of(rows):
        errors = Errors.of(memory_ratios(row for row in rows if row.source == source and not row.sick))
        if errors.rows:
            cells.append(
                (source, str(errors.rows), _percent(errors.median), _percent(errors.p90), _signed(errors.bias))
            )
    return _table(
        "memory of a rank, predicted against measured", ("source", "rows", "median %", "p90 %", "bias %"), cells
    )


def worst_table(rows: Sequence[Row], count: int) -> Table:
    """The rows furthest off, with what the prediction is made of."""

    def off(row: Row) -> float:
        return math.log(step_time(row.job).seconds / (row.step_s or math.nan))

    cells = []
    for row in sorted(timed(rows), key=lambda row: -abs(off(row)))[:count]:
        step = step_time(row.job)
        most = sorted(step.kinds.items(), key=lambda item: -item[1])[:3]
        made_of = ", ".join(f"{kind} {100 * part / step.seconds:.0f}%" for kind, part in most)
        cells.append((row.source, row.name, f"{row.step_s:.3g}", f"{step.seconds:.3g}", made_of))
    return _table("worst rows", ("source", "row", "measured s", "predicted s", "predicted of"), cells)


def skipped_table(skipped: Sequence[Skipped]) -> Table:
    """What could not be predicted, and why."""
    counts = Counter((s.source, s.why) for s in skipped)
    return _table("not predicted", ("rows", "source", "why"), [(str(n), *key) for key, n in counts.items()])


def sensitivity_table(rows: Sequence[Row]) -> Table:
    """How much predictions move with each constant."""
    cells = []
    for name in dict.fromkeys(row.job.machine.constants_name for row in rows):
        ours = [row for row in timed(rows) if row.job.machine.constants_name == name]
        if ours:
            found = sorted(sensitivity(ours[:: max(1, len(ours) // 100)]).items(), key=lambda item: -item[1])
            cells.append((name, ", ".join(f"{constant} {moves:.1f}" for constant, moves in found if moves >= 0.05)))
    return _table("mean change of the time, in %, where a constant grows by 10 %", ("GPU", "constant"), cells)


def plot(rows: Sequence[Row], folder: Path) -> list[Path]:
    """A scatter plot for each source, and one of memory: measured across, predicted up, both logarithmic."""
    import matplotlib  # not at the top: it takes half a second

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for source in sources_of(timed(rows)):
        ours = [row for row in timed(rows) if row.source == source]
        points = [(row.step_s or math.nan, step_time(row.job).seconds, is_seen(row)) for row in ours]
        written.append(_scatter(folder, source, "seconds of a step", points))
    memory = [row for row in rows if row.memory_gib and not row.sick]
    if memory:
        ratios = memory_ratios(memory)
        points = [
            (r.memory_gib or 0, ratio * (r.memory_gib or 0), is_seen(r))
            for r, ratio in zip(memory, ratios, strict=True)
        ]
        written.append(_scatter(folder, "memory", "GiB of a rank", points))
    return written


def _scatter(folder: Path, name: str, unit: str, points: Sequence[tuple[float, float, bool]]) -> Path:
    from matplotlib import pyplot  # see plot

    figure, axes = pyplot.subplots(figsize=(5, 5), layout="constrained")
    low, high = min(min(p[:2]) for p in points), max(max(p[:2]) for p in points)
    axes.plot((low, high), (low, high), color="0.6", linewidth=1)
    for seen, color, label in ((True, "0.6", "fitted on"), (False, "tab:blue", "not seen")):
        ours = [p for p in points if p[2] == seen]
        axes.scatter([p[0] for p in ours], [p[1] for p in ours], s=10, color=color, label=label)
    axes.set(xscale="log", yscale="log", xlabel=f"measured {unit}", ylabel=f"predicted {unit}", title=name)
    axes.legend()
    path = folder / (name.lower().replace(" ", "-").replace(",", "") + ".png")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1f}"


def _signed(value: float) -> str:
    return "" if math.isnan(value) else f"{value:+.1f}"


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of a Markdown page."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page_part(rows: Sequence[Row], recommended: Sequence[Recommended]) -> str:
    """What docs/planning.md holds between its marks: errors, order, failures, memory, recommended layouts."""
    unseen = [row for row in rows if not is_seen(row)]
    total = summary(unseen)
    taus = [(name, f"{tau:.2f}") for name, tau in sweep_taus(timed(unseen)).items()]
    memory = Errors.of(memory_ratios(row for row in unseen if not row.sick and row.failed is not None))
    parts = [
        "Step time, of rows that the fit did not see; then how many it saw, and their median. Sick rows are left out.",
        markdown(ERROR_HEADINGS, error_cells(rows)),
        f"All {total['rows']}: median {total['median_error_percent']} %, "
        f"90th percentile {total['p90_error_percent']} %. Out of memory, of the H100 sweep's unseen half: "
        f"precision {total['oom_precision']}, recall {total['oom_recall']}. "
        f"Memory of a rank there: median {memory.median:.1f} %, 90th percentile {memory.p90:.1f} %.",
        f"Kendall tau within sweeps (mean {total['kendall_tau']}), pairs within 2 % of each other left out:",
        markdown(("sweep", "tau"), taus),
    ]
    if recommended:
        parts += [
            "NVIDIA's recommended layouts beside the planner's best of the same GPUs, batch and precision:",
            markdown(("model", "GPUs", "theirs", "s", "best", "s", "theirs slower by"), recommended_cells(recommended)),
        ]
    return "\n\n".join(parts)


def recommended_cells(found: Sequence[Recommended]) -> list[tuple[str, ...]]:
    """Their layout and the planner's, seconds of a step, and how much slower theirs is predicted."""

    def words(layout: Layout) -> str:
        text = f"tp {layout.tp} pp {layout.pp}" + (f" x{layout.virtual}" if layout.virtual > 1 else "")
        return text + (f" cp {layout.cp}" if layout.cp > 1 else "") + f" micro {layout.micro_batch}"

    return [
        (
            r.name,
            str(r.layout.gpus),
            words(r.layout) + ("" if r.fits else ", does not fit"),
            f"{r.seconds:.3g}",
            words(r.best.job.layout),
            f"{r.best.step.seconds:.3g}",
            f"{100 * r.slower:+.0f} %",
        )
        for r in found
    ]


def write_page(page: Path, part: str) -> None:
    """Put it between the marks of a page."""
    text = page.read_text(encoding="utf-8")
    before, after = text.split(MARKS[0])[0], text.split(MARKS[1])[1]
    page.write_text(f"{before}{MARKS[0]}\n\n{part}\n\n{MARKS[1]}{after}", encoding="utf-8")
