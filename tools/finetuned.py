"""Put the results of fine-tuned runs together: of each task, what the seeds scored, their mean and their spread.

python tools/finetuned.py runs/sst2-1 runs/sst2-2 runs/sst2-3
python tools/finetuned.py runs/sst2-1 runs/sst2-2 --json results.json    # the same as JSON

A run's score is that of its best validation: the mean of what GLUE measures the task by. The spread is the standard
deviation of a sample.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.finetune.result import RESULT, read_result


@dataclass(frozen=True)
class Group:
    """The runs of one task from one base. figures: of each, the mean over the runs."""

    task: str
    base: str | None
    seeds: list[int]
    scores: list[float]
    mean: float
    spread: float | None
    figures: dict[str, float]


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a fine-tuned run")
    parser.add_argument("--json", type=Path, help="where the same goes as JSON")
    args = parser.parse_args()
    groups = grouped(args.runs)
    table = Table("task", "base", "runs", "mean", "spread", "least", "most", "figures", box=SIMPLE_HEAD)
    for group in groups:
        spread = "" if group.spread is None else f"{group.spread:.4f}"
        figures = ", ".join(f"{name} {value:.4f}" for name, value in group.figures.items())
        ends = f"{min(group.scores):.4f}", f"{max(group.scores):.4f}"
        row = group.task, group.base or "none", str(len(group.scores)), f"{group.mean:.4f}", spread, *ends, figures
        table.add_row(*row)
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps([asdict(group) for group in groups], indent=1) + "\n", encoding="utf-8")


def grouped(runs: list[Path]) -> list[Group]:
    """One a task and base, in the order of the runs.  Raises UserError for a run without a result."""
    found = defaultdict(list)
    for run in runs:
        result = read_result(run)
        if result is None:
            raise UserError(f"{run} has no {RESULT}", remedy="give the folders of runs that were fine-tuned for a task")
        found[result.get("task"), result.get("base"), result.get("weights")].append(result)
    groups = []
    for (task, base, weights), results in found.items():
        scores = [float(result["score"]) for result in results]
        names = results[0]["figures"]
        figures = {name: statistics.mean(result["figures"][name] for result in results) for name in names}
        spread = statistics.stdev(scores) if len(scores) > 1 else None
        origin = base if weights else None
        seeds = [result["seed"] for result in results]
        groups.append(Group(task, origin, seeds, scores, statistics.mean(scores), spread, figures))
    return groups


if __name__ == "__main__":
    run_cli(main)
