#!/usr/bin/env python3
"""Evaluate trained models by the tasks of the papers.

    python tools/evaluate.py --load runs/a --tasks lambada_openai piqa --data DIR
    python tools/evaluate.py --load runs/a@all --tasks wikitext2 --data DIR         # a curve over its checkpoints
    python tools/evaluate.py --load runs/a --tasks text:book.txt --stride 256       # any text
    torchrun --nproc-per-node 4 tools/evaluate.py --load FOLDER --pp 2 --tasks piqa --data DIR
    python tools/evaluate.py --list                                                 # the tasks, and the files they read

Takes runs, checkpoints and folders of transformers as they are. Each question is answered once and kept in --out: the
same command goes on where it stopped. Several processes share a large model by tensor parallelism or --pp stages; --dp
replicas share out the questions.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from megagpt.checkpoint.folders import checkpoints_of, step_of
from megagpt.console import console_here
from megagpt.console import show as print_table
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.evaluate.answers import Answers, Show
from megagpt.evaluate.diagnose.diagnose import diagnose
from megagpt.evaluate.diagnose.show import show_findings
from megagpt.evaluate.report import Subject, as_json, draw, table, write_records
from megagpt.evaluate.run import Result, files_of, run_task, tasks_named
from megagpt.evaluate.task import Task, text_of_record
from megagpt.evaluate.tasks import ALL
from megagpt.files import json_text, replace_text
from megagpt.generate.flags import add_load_flags, load_from
from megagpt.generate.trained import Trained, laid_out
from megagpt.inventory.layers import canonical
from megagpt.processes.agree import together
from megagpt.train.plot import labels_of


def main() -> None:
    """Put each task to each model, and print one table."""
    args = parse()
    with laid_out(pp=args.pp, dp=args.dp) as (mesh, _):
        tasks = together(lambda: checked(args))
        loads = [one for load in args.load for one in expanded(load)]
        subjects, results = [], []
        for load, name in zip(loads, labels_of([Path(load) for load in loads]), strict=True):
            trained = load_from(args, load, mesh)
            subjects.append(subject_of(trained, load, name, args))
            results.append(evaluated(trained, tasks, args, name))
            if args.diagnose:
                diagnosed(trained, results[-1], args, name)
        if mesh.rank == 0:
            report(subjects, results, args)


def parse() -> argparse.Namespace:
    """The flags."""
    parser = ArgumentParser(description=__doc__)
    add_load_flags(parser, several=True)
    add = parser.add_argument_group("what is asked").add_argument
    add("--tasks", nargs="+", required=True, metavar="NAME", help="of --list, text:FILE, dataset:PREFIX[:SPLIT]")
    add("--data", type=Path, default=Path(), metavar="DIR", help="folder of the tasks' files (default: here)")
    add("--few-shot", type=int, metavar="K", help="examples before each question (default: as the task has it)")
    add("--stride", type=int, metavar="N", help="of texts as a whole: tokens that a window scores (default: all)")
    add("--limit", type=int, metavar="N", help="the first N documents of each task only")
    add("--diagnose", action="store_true", help="why a number is odd: also in OUT/MODEL-diagnosis.json")
    add("--list", action=ListTasks, nargs=0, help="show the tasks and end")
    add = parser.add_argument_group("what is written").add_argument
    add("--out", type=Path, default=Path("evaluation"), metavar="DIR", help="folder of all that is kept (./evaluation)")
    add("--json", type=Path, metavar="FILE", help="the figures as JSON")
    add("--records", action="store_true", help="each document's question, answer and figures, in OUT/MODEL/TASK.jsonl")
    return parser.parse_args()


class ListTasks(argparse.Action):
    """Of each task its name, what it asks, and its files; and end."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        for task in ALL.values():
            print(f"{task.name}\n    {task.about}; {task.protocol}\n    {', '.join(task.files)}: {task.source}")
        parser.exit()


def checked(args: argparse.Namespace) -> list[Task]:
    """The tasks, of which all files are there.  Raises UserError before anything is read or asked."""
    for name, least in (("few_shot", 0), ("limit", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"got --{name.replace('_', '-')} {value}", f"wanted {least} or more", "change it")
    tasks = tasks_named(args.tasks, args.stride)
    for task in tasks:
        files_of(task, args.data, args.few_shot)
    args.out.mkdir(parents=True, exist_ok=True)
    return tasks


def expanded(load: str) -> list[str]:
    """RUN@all: each checkpoint of the run, oldest first."""
    run, at, which = load.rpartition("@")
    if not at or which != "all":
        return [load]
    steps = [step_of(folder) for folder in checkpoints_of(Path(run))]
    if not steps:
        raise UserError(f"got --load {load}", f"{run} has no checkpoints", "name a run")
    return [f"{run}@{step}" for step in steps]


def subject_of(trained: Trained, load: str, name: str, args: argparse.Namespace) -> Subject:
    """What the report says of a model."""
    mesh, model = trained.mesh, trained.config.model
    return Subject(
        name=name,
        load=load,
        folder=trained.folder,
        step=trained.step,
        n_parameters=sum(parameter.size for parameter in canonical(model).values()),
        precision=args.precision,
        layout={"tp": mesh.model.size, "pp": mesh.pipe.size, "dp": mesh.data.size},
        tokenizer_sha256=trained.tokenizer.sha256 if trained.tokenizer else "",
    )


def evaluated(trained: Trained, tasks: Sequence[Task], args: argparse.Namespace, name: str) -> list[Result]:
    """All tasks put to one model."""
    results = []
    with progress(trained.mesh.rank == 0) as bar:
        answers = Answers(trained, args.out / "answers.jsonl")
        for task in tasks:
            answers.show = shown(bar, f"{name}: {task.name}")
            results.append(run_task(task, answers, args.data, shots=args.few_shot, limit=args.limit))
    return results


def diagnosed(trained: Trained, results: Sequence[Result], args: argparse.Namespace, name: str) -> None:
    """Tell, and write, what may be wrong with a model on the texts that the tasks asked it about."""
    answers = Answers(trained, args.out / "answers.jsonl")
    findings = diagnose(answers, [text_of_record(record) for result in results for record in result.records])
    if trained.mesh.rank == 0:
        print(f"\n{name}")
        show_findings(console_here(), findings)
        written = args.out / f"{name.replace('/', '-')}-diagnosis.json"
        replace_text(written, json_text(findings.as_json(), indent=2) + "\n")


@contextmanager
def progress(speaks: bool) -> Iterator[Progress]:
    """Bars with the time left, on standard error."""
    with Progress(*Progress.get_default_columns(), console=Console(stderr=True), disable=not speaks) as bar:
        yield bar


def shown(bar: Progress, name: str) -> Show:
    """A bar of its own for one task."""
    row = bar.add_task(name, total=None)
    return lambda what, done, total: bar.update(row, description=f"{name}, {what}", completed=done, total=total)


def report(subjects: Sequence[Subject], results: Sequence[Sequence[Result]], args: argparse.Namespace) -> None:
    """Print the table; write what was asked for."""
    print_table(console_here(), table(subjects, results))
    if args.json:
        replace_text(args.json, json_text(as_json(subjects, results), indent=2) + "\n")
    if args.records:
        for subject, of_tasks in zip(subjects, results, strict=True):
            write_records(args.out, subject, of_tasks)
    if len(subjects) > 1:
        draw(subjects, results, args.out / "curve.png")
        print(f"\ncurve: {args.out / 'curve.png'}")


if __name__ == "__main__":
    run_cli(main)
