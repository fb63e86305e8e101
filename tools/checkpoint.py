#!/usr/bin/env python3
"""Look at checkpoints, check them, compare them, and make others of them. None of it needs a GPU or the run's layout.

  python tools/checkpoint.py list runs/a                        what a run has; --verify: and whether it is whole
  python tools/checkpoint.py inspect runs/a@best                where it stands, and every tensor in numbers
  python tools/checkpoint.py verify runs/a                      every byte against its hash; exit code 2: damage
  python tools/checkpoint.py diff runs/a@100 runs/b@100         what differs, and by how much; 0 equal, 1 not
  python tools/checkpoint.py reshape runs/a --files 1 --out one             the same in one file a kind, to share
  python tools/checkpoint.py average runs/a --last 5 --out mean             mean of the weights, to evaluate and export
  python tools/checkpoint.py export runs/a --out hf                         for Hugging Face transformers (--as mistral)
  python tools/checkpoint.py import hf --out runs/b                         from there; it says how to train on

A checkpoint is named as for --load: RUN (its latest one), RUN@latest, RUN@best, RUN@STEP, or its own folder.
What is written appears when it is complete. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from megagpt.checkpoint import compare, folders, rewrite
from megagpt.checkpoint.integrity import damage_of
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.state import State, read_state
from megagpt.checkpoint.strict import Allowed
from megagpt.data.tokenizers.flags import add_tokenizer_flags, named_tokenizer
from megagpt.errors import ArgumentParser, UserError, home_expanded, run_cli
from megagpt.inventory.parameter import AVERAGE, WEIGHT

_LARGE_BYTES = 1 << 30
_LOAD = "RUN, RUN@best, RUN@STEP, or the folder of a checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Do one command; its exit code."""
    args = _parser().parse_args(argv)
    return args.command(args) or 0


def _list(args: argparse.Namespace) -> None:
    run = Path(args.run)
    found, latest, note = _checkpoints(run)
    best = folders.best_of(run)
    table = _table("step", "tokens", "validation loss", "layout", "size", "age", "")
    for folder in found:
        marks = [word for word, which in (("latest", latest), ("best", best)) if which == folder]
        if args.verify:
            wrong = _damage([folder])[folder]
            marks.append(f"DAMAGED: {wrong[0]}" if wrong else "whole")
        size, age = _size(_n_bytes(folder)), _age(time.time() - folder.stat().st_mtime)
        try:
            at = read_state(folder)
        except UserError:
            table.add_row(f"{folders.step_of(folder)}", "?", "?", "?", size, age, ", ".join(marks or ["DAMAGED"]))
        else:
            loss = "" if at.validation_loss is None else f"{at.validation_loss:.4f}"
            table.add_row(f"{at.step:,}", f"{at.tokens:,}", loss, _layout(at), size, age, ", ".join(marks))
    _print(table)
    if note:
        _print(note)


def _inspect(args: argparse.Namespace) -> None:
    folder = folders.find(args.checkpoint)
    at = read_state(folder)
    table, n_not_finite = _table("tensor", "shape", "norm", "min", "max", "not finite"), 0
    with Reader(folder) as reader:
        for name, value in _facts(at, reader).items():
            print(f"{name:24} {value}")
        with _progress("reading", _n_bytes(folder)) as tick:
            for s in compare.summaries(reader):
                tick(4 * math.prod(s.shape))
                n_not_finite += s.n_not_finite
                if s.key == WEIGHT or args.moments or s.n_not_finite:
                    name = s.name if s.key == WEIGHT else f"{s.name} ({s.key})"
                    figures = (f"{s.norm:.4g}", f"{s.low:.4g}", f"{s.high:.4g}", f"{s.n_not_finite or ''}")
                    table.add_row(name, " x ".join(map(str, s.shape)), *figures)
    _print(table)
    print(f"{n_not_finite} values are NaN or Inf" if n_not_finite else "all values are finite", end="; ")
    print(f"the hashes were not looked at: tools/checkpoint.py verify {args.checkpoint}")


def _facts(at: State, reader: Reader) -> dict[str, object]:
    """What a checkpoint is, beside its tensors."""
    n_parameters = sum(math.prod(tensor.shape) for tensor in reader.index.get(WEIGHT, {}).values())
    return {
        "checkpoint": reader.folder,
        "origin": at.origin or "saved by a run",
        "step": f"{at.step:,}, {at.samples:,} samples, {at.tokens:,} tokens",
        "validation loss": "not measured" if at.validation_loss is None else at.validation_loss,
        "learning rate": at.lr,
        "written by": _layout(at) or "no run",
        "parameters": f"{n_parameters:,}",
        "holds": ", ".join(reader.index),
        "size": f"{_size(_n_bytes(reader.folder))} in {sum(1 for _ in reader.folder.iterdir())} files",
        "skipped steps": ", ".join(map(str, at.skipped_steps)) or "none",
        **{f"counter {name}": f"{value:g}" for name, value in at.counters.items()},
        **{f"data {name}": value for name, value in at.data.items()},
    }


def _verify(args: argparse.Namespace) -> None:
    run = Path(args.checkpoint)
    pointer_wrong = None
    if (run / "checkpoints").is_dir():
        wanted, _, pointer_wrong = _checkpoints(run)
    else:
        wanted = [folders.find(args.checkpoint)]
        run = folders.run_of(args.checkpoint)
    found = _damage(wanted)
    for folder, wrong in found.items():
        print("\n".join(wrong) if wrong else f"{folder}: whole, {_size(_n_bytes(folder))}")
    if pointer_wrong:
        print(pointer_wrong)
    damaged = [folder for folder, wrong in found.items() if wrong]
    if damaged or pointer_wrong:
        what = f"{len(damaged)} of {len(found)} checkpoints damaged" if damaged else "`latest` is damaged"
        raise UserError(f"{what}; {_offer(run, found)}")


def _diff(args: argparse.Namespace) -> int:
    a, b = folders.find(args.a), folders.find(args.b)
    fields = [] if args.tensors_only else compare.differing_fields(read_state(a), read_state(b))
    tensors, n_differ = _table("tensor", "", "values", "largest difference", "to the largest element"), 0
    with Reader(a) as first, Reader(b) as second, _progress("comparing", _n_bytes(a)) as tick:
        n_tensors = len({(key, name) for r in (first, second) for key, named in r.index.items() for name in named})
        for d in compare.differing_tensors(first, second, tick):
            name = d.name if d.key == WEIGHT else f"{d.name} ({d.key})"
            figures = (f"{d.n_values:,}", f"{d.largest:.3g}", f"{d.relative:.3g}") if d.n_values else ("", "", "")
            tensors.add_row(name, d.what, *figures)
            n_differ += d.n_tensors
    if fields:
        states = _table("state", str(args.a), str(args.b))
        for name, x, y in fields:
            states.add_row(name, str(x), str(y))
        _print(states)
    if n_differ:
        _print(tensors)
    print(f"{n_differ} of {n_tensors} tensors and {len(fields)} fields of the state differ")
    return 1 if fields or n_differ else 0


def _reshape(args: argparse.Namespace) -> None:
    source = folders.find(args.checkpoint)
    _require_whole([source])
    with _progress("writing", _n_bytes(source)) as tick:
        rewrite.reshape(source, args.out, args.files, tick)
    print(f"wrote {args.out}: the tensors of {source} in {args.files} files a kind; --load {args.out}")


def _average(args: argparse.Namespace) -> None:
    if args.last is not None:
        if len(args.checkpoints) != 1:
            raise UserError(f"got {len(args.checkpoints)} names with --last, which counts in one run; give one")
        found = folders.checkpoints_of(Path(args.checkpoints[0]))
        if not 1 <= args.last <= len(found):
            raise UserError(f"--last {args.last}: {args.checkpoints[0]} has {len(found)} checkpoints; give 1 to that")
        sources = found[-args.last :]
    else:
        sources = [folders.find(name) for name in args.checkpoints]
        if len(sources) < 2:
            raise UserError("one checkpoint has no mean with itself; give several, or a run and --last N")
    _require_whole(sources)
    with _progress("writing", _n_bytes(sources[0])) as tick:
        rewrite.average(sources, args.out, tick, AVERAGE if args.weights == "ema" else WEIGHT)
    print(
        f"wrote {args.out}: the mean of {', '.join(map(str, sources))}; to evaluate, generate and export, not to train"
    )


def _export(args: argparse.Namespace) -> None:
    source = folders.find(args.checkpoint)
    _require_whole([source])
    if args.adapter:
        _export_adapter(source, args)
        return
    print("loading torch and transformers ...", file=sys.stderr)
    from megagpt.hf.export_folder import export  # seconds, which no other command should take

    exported = export(
        source,
        args.out,
        args.architecture,
        tokenizer=named_tokenizer(args),
        without_tokenizer=args.without_tokenizer,
        allowed=Allowed(unused=args.allow_unused),
    )
    print(
        f"wrote {args.out}, a {exported.architecture}; logits of transformers' own model differ by "
        f"{exported.worst:.1e} of the largest at most"
    )
    if exported.note:
        print(f"note: {exported.note}")


def _export_adapter(source: Path, args: argparse.Namespace) -> None:
    print("loading torch ...", file=sys.stderr)
    from megagpt.hf.adapter_runs import export_adapter  # likewise

    architecture = export_adapter(source, args.out, args.architecture, args.base)
    print(f"wrote {args.out}, adapters for a {architecture} as peft has them: PeftModel.from_pretrained(model, folder)")


def _import(args: argparse.Namespace) -> None:
    print("loading torch ...", file=sys.stderr)
    if args.base is not None:
        from megagpt.hf.adapter_runs import import_adapter  # likewise

        folder = import_adapter(args.source, args.base, args.out)
        print(f"wrote {folder}; generate: --load {args.out}; train on: --load {args.out}, with its config.yaml")
        return
    from megagpt.hf.import_folder import import_model  # seconds, which no other command should take

    say = partial(print, file=sys.stderr)
    folder = import_model(args.source, args.out, allow_unused=args.allow_unused, say=say)
    print(f"wrote {folder}; train on: --load {args.out} --config {args.out / 'config.yaml'} --data-path …")


def _damage(wanted: Iterable[Path]) -> dict[Path, list[str]]:
    """What is wrong with each checkpoint, every byte read."""
    wanted = list(wanted)
    with _progress("verifying", sum(map(_n_bytes, wanted))) as tick:
        return {folder: damage_of(folder, tick) for folder in wanted}


def _require_whole(sources: Sequence[Path]) -> None:
    for folder, wrong in _damage(sources).items():
        if wrong:
            raise UserError(f"{wrong[0]}; {_offer(folder.parent.parent, {folder: wrong})}")


def _offer(run: Path, known: dict[Path, list[str]]) -> str:
    """The newest whole checkpoint of a run, for whoever must load another."""
    for folder in reversed(folders.checkpoints_of(run)):
        if not (known[folder] if folder in known else damage_of(folder)):
            return f"the newest whole one: --load {run}@{folders.step_of(folder)}"
    return f"no checkpoint of {run} is whole"


def _checkpoints(run: Path) -> tuple[list[Path], Path | None, str | None]:
    """What a run has, what its `latest` names, and what is wrong with that."""
    found = folders.checkpoints_of(run)
    try:
        latest = folders.pointed(run)
    except UserError as error:
        if not found:
            raise UserError(
                f"{run} has no checkpoints; give the folder of a run, which has checkpoints/step-…"
            ) from None
        return found, None, str(error)
    return (found if latest in found else [*found, latest]), latest, None  # a crash may leave it under another name


def _layout(at: State) -> str:
    return " ".join(f"{name.removesuffix('_stage')}={value}" for name, value in at.layout.items())


def _n_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*") if path.is_file())


def _size(n_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.3g} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.3g} TiB"


def _age(seconds: float) -> str:
    for unit, length_s in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length_s:
            return f"{seconds / length_s:.0f} {unit}"
    return f"{seconds:.0f} s"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number in (0, len(columns) - 1) else "right", overflow="fold")
    return table


def _print(what: Any) -> None:
    width = None if sys.stdout.isatty() else 140
    Console(width=width, highlight=False, markup=False, emoji=False).print(what, soft_wrap=isinstance(what, str))


@contextmanager
def _progress(what: str, n_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal, one line in a log, nothing for what takes a moment; yields what counts bytes."""
    if n_bytes < _LARGE_BYTES:
        yield lambda n: None
    elif not sys.stderr.isatty():
        print(f"{what} {_size(n_bytes)} ...", file=sys.stderr)
        yield lambda n: None
    else:
        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(what, total=n_bytes)
            yield lambda n: progress.advance(task, n)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands (each has a --help)")

    def command(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=run)
        return added

    _add_readers(command)
    _add_writers(command)
    return parser


def _add_readers(command: Callable[..., ArgumentParser]) -> None:
    p = command("list", _list, "the checkpoints of a run, which is the latest and which the best")
    p.add_argument("run", metavar="RUN", type=home_expanded, help="folder of a run")
    p.add_argument("--verify", action="store_true", help="also read every byte, and say which are whole")
    p = command("inspect", _inspect, "where a checkpoint stands, and its tensors: norm, smallest, largest, NaN or Inf")
    p.add_argument("checkpoint", metavar="CKPT", type=home_expanded, help=_LOAD)
    p.add_argument("--moments", action="store_true", help="also list the optimizer's moments")
    p = command("verify", _verify, "every byte against its hash, the index against the files; exit code 2 for damage")
    p.add_argument("checkpoint", metavar="CKPT|RUN", type=home_expanded, help=f"{_LOAD}; a run means all it has")
    p = command("diff", _diff, "what differs between two checkpoints: exit code 0 nothing, 1 something")
    p.add_argument("a", metavar="A", type=home_expanded, help=_LOAD)
    p.add_argument("b", metavar="B", type=home_expanded, help=_LOAD)
    p.add_argument("--tensors-only", action="store_true", help="let the states differ: configuration, step, layout")


def _add_writers(command: Callable[..., ArgumentParser]) -> None:
    reshape = command("reshape", _reshape, "the same checkpoint in another number of files, in bounded memory")
    reshape.add_argument("checkpoint", metavar="CKPT", type=home_expanded, help=_LOAD)
    reshape.add_argument("--files", type=int, required=True, metavar="N", help="files a kind (weights, each moment)")
    average = command("average", _average, "the mean of the weights of several checkpoints, in bounded memory")
    average.add_argument(
        "checkpoints", metavar="CKPT", nargs="+", type=home_expanded, help=f"{_LOAD}; or with --last one RUN"
    )
    average.add_argument("--last", type=int, metavar="N", help="the newest N of a run")
    ema = "ema: of the moving averages that the run kept"
    average.add_argument("--weights", choices=("last", "ema"), default="last", help=ema)
    what = "a folder for Hugging Face transformers, compared with its own model before it is done"
    export = command("export", _export, what)
    export.add_argument("checkpoint", metavar="CKPT", type=home_expanded, help=_LOAD)
    name = "its architecture there (model_type); default what fits"
    export.add_argument("--as", dest="architecture", metavar="NAME", help=name)
    export.add_argument("--without-tokenizer", action="store_true", help="the weights alone")
    alone = "of a run with adapters: these alone, as the folder of peft, and not merged into their base"
    export.add_argument("--adapter", action="store_true", help=alone)
    export.add_argument("--base", metavar="NAME", help="with --adapter: what transformers calls the base")
    export.add_argument("--allow-unused", action="store_true", help="leave tensors that the architecture has not")
    add_tokenizer_flags(export)
    what = "a run that begins with the weights of a Hugging Face folder (safetensors only)"
    begin = command("import", _import, what)
    begin.add_argument("source", metavar="DIR", type=Path, help="folder with config.json and model.safetensors")
    beside = "DIR holds adapters of peft, for this run or checkpoint: the run that is written trains them on"
    begin.add_argument("--base", metavar="CKPT", type=home_expanded, help=beside)
    begin.add_argument("--allow-unused", action="store_true", help="leave tensors that the architecture has not")
    for p in (reshape, average, export, begin):
        p.add_argument("--out", type=Path, required=True, metavar="DIR", help="new folder to write")


if __name__ == "__main__":
    run_cli(main)
