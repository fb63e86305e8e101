"""A picture of a pipeline's schedule: who works when, by the event simulation. No torch."""

from __future__ import annotations

from pathlib import Path

from megagpt.errors import UserError
from megagpt.plan.job import Job
from megagpt.plan.pipeline import Event, simulate
from megagpt.plan.step import pipeline_durations

_COLORS = {"F": "tab:blue", "B": "tab:orange", "W": "tab:green"}
_NAMES = {"F": "forward", "B": "backward", "W": "backward, weights"}
_MOST_MICRO_BATCHES = 24  # more are no longer seen


def draw(job: Job, path: Path) -> None:
    """Write an .svg or .png: a line a rank, a bar a task; white is bubble. Later virtual stages are paler.

    Raises: UserError for another kind of file, or where it cannot be written.
    """
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"--draw {path} is no .svg or .png; name one")
    import matplotlib  # not at the top: it takes half a second

    matplotlib.use("Agg")
    from matplotlib import pyplot  # after the backend has been chosen

    events = scheduled(job)
    end = max(event.end_s for event in events)
    figure, axes = pyplot.subplots(figsize=(12, 1.2 + 0.3 * job.layout.pp), layout="constrained")
    for event in events:
        chunk = event.task.stage // job.layout.pp
        axes.broken_barh(
            [(event.start_s, event.end_s - event.start_s)], (event.rank - 0.42, 0.84),
            facecolor=_COLORS[event.task.kind],
            alpha=1 - 0.6 * chunk / max(1, job.layout.virtual), edgecolor="white", linewidth=0.3,
        )  # fmt: skip
    for kind in sorted({event.task.kind for event in events}, key="FBW".index):
        axes.bar(0, 0, color=_COLORS[kind], label=_NAMES[kind])
    busy = sum(event.end_s - event.start_s for event in events)
    bubble = 1 - busy / end / job.layout.pp
    layout = job.layout
    axes.set(
        xlabel="seconds", ylabel="pipeline rank", xlim=(0, end), ylim=(layout.pp - 0.5, -0.5),
        title=f"{layout.schedule}, {layout.pp} ranks, {_micro_batches(job)} micro-batches: {100 * bubble:.0f} % bubble",
    )  # fmt: skip
    axes.legend(loc="upper right", ncols=3)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UserError(f"--draw {path} cannot be written: {error}") from error
    pyplot.close(figure)


def scheduled(job: Job) -> list[Event]:
    """The tasks of a step; of very many micro-batches, of the first."""
    layout = job.layout
    return simulate(layout.schedule, layout.pp, layout.virtual, _micro_batches(job), pipeline_durations(job))


def _micro_batches(job: Job) -> int:
    most = max(_MOST_MICRO_BATCHES, 2 * job.layout.pp)
    return min(job.layout.micro_batches, most // job.layout.pp * job.layout.pp)
