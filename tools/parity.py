#!/usr/bin/env python3
"""One run, any layout: train the same steps in every layout, and show how far each lies from one process.

python tools/parity.py --layouts "tp=2 pp=2, zero=3" --json parity.json
python tools/parity.py --preset palm-540b --seq-len 40
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.metadata
import os
import platform
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from megagpt.cli import parse_run_config
from megagpt.config import plain
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.files import json_text, os_reason
from megagpt.model.position import POSITIONS, Position
from tests.parity.shrunken import shrunken

DESCRIPTION = """Train 20 steps of a small GPT in every layout that fits on 1 to 8 processes (gloo, on the CPU), and
compare losses, gradient norms, gradients of the first step and final weights with those of one process without ZeRO.
With --preset the GPT is a published model, shrunken, with its recipe (tests/parity/shrunken.py).
The figures are the largest differences: relative; of gradients, as a share of the tensor's largest element;
of weights, as a share of the way that Adam can go in these steps. The bounds, with reasons: tests/parity/walk.py.

Gradients are those of the first step, from equal weights: that bound is one of round-off alone, whatever the model.
Loss and norm are the worst of all steps, weights the last ones: each step's round-off goes into the next step's
weights, so that these grow with steps and learning rate. They grow fastest where no position is added to the
embeddings (ALiBi, rotary, T5, Transformer-XL, none); docs/architecture.md has figures."""

HEADER = f"{'layout':<48}{'loss':>9}{'norm':>9}{'gradient':>10}{'weights':>9}{'time':>8}"


def main() -> int:
    """Walk, print a line per layout, write the JSON; exit code 1 where a layout differs."""
    options = _options().parse_args()
    os.environ["DS_ACCELERATOR"] = "cpu"  # read once, while DeepSpeed is imported
    parity: Any = importlib.import_module("tests.parity.walk")  # after the flags: this takes seconds
    config, bounds = _config(parity, options), parity.BOUNDS[options.precision]
    layouts = _matching(parity.all_layouts(options.max_processes, options.precision), options.layouts)
    print(f"{len(layouts)} layouts, {config.train.train_steps} steps each; reference: {parity.REFERENCE}")
    print(HEADER)
    bounds_line = (bounds.loss, bounds.grad_norm, bounds.gradient, bounds.weight)
    print(f"{'allowed':<48}" + _figures(*bounds_line))
    print(f"{'of':<48}{'all steps':>9}{'all':>9}{'the first':>10}{'the last':>9}", flush=True)
    position = config.model.position
    if POSITIONS[position].embed is Position.embed:
        print(f"note: {position} adds nothing to the embeddings: all but the gradients differ by more and more")
    rows, start = [], time.perf_counter()
    for layout, difference, seconds in parity.walk(config, layouts):
        rows.append({"layout": str(layout), "seconds": round(seconds, 2), **dataclasses.asdict(difference)})
        _print_row(layout, difference, seconds)
    bad = [row["layout"] for row in rows if not row["ok"]]
    print(f"{len(rows) - len(bad)} of {len(rows)} layouts agree, in {time.perf_counter() - start:.0f} s")
    if options.json:
        _write_json(options.json, config, bounds, rows)
    return 1 if bad else 0


def _config(parity: Any, options: argparse.Namespace) -> Any:
    """The run to be spread out."""
    if options.preset is None:
        if options.seq_len is not None:
            raise UserError("--seq-len belongs to --preset; give both, or leave it out")
        return parity.parity_config(precision=options.precision)
    if options.preset == "tiny":
        raise UserError("--preset tiny is no published model and has no vocabulary; leave --preset out")
    seq_len = 24 if options.seq_len is None else options.seq_len
    if seq_len < 1:
        raise UserError(f"--seq-len {seq_len} is no length; use 8 or more")
    small = shrunken(parse_run_config(["--preset", options.preset]), seq_len=seq_len)
    return dataclasses.replace(small, train=dataclasses.replace(small.train, precision=options.precision))


def _print_row(layout: Any, difference: Any, seconds: float) -> None:
    figures = _figures(difference.loss, difference.grad_norm, difference.gradient, difference.weight)
    verdict = "ok" if difference.ok else f"DIFFERS, first in {difference.first_bad_tensor or 'loss or norm'}"
    print(f"{layout!s:<48}{figures}{seconds:>6.1f} s  {verdict}", flush=True)


def _figures(loss: float, norm: float, gradient: float, weight: float) -> str:
    return f"{loss:>9.1e}{norm:>9.1e}{gradient:>10.1e}{weight:>9.1e}"


def _matching(layouts: list[Any], wanted: str) -> list[Any]:
    """Those that have all words of one of the comma-separated alternatives."""
    known = {word for layout in layouts for word in str(layout).split()}
    alternatives = [set(part.split()) for part in wanted.split(",")]
    for word in sorted(set().union(*alternatives)):
        if word not in known:
            raise UserError(f"--layouts: no layout has {word!r}; wanted some of {', '.join(sorted(known))}")
    found = [layout for layout in layouts if any(words <= set(str(layout).split()) for words in alternatives)]
    if not found:
        raise UserError(f"--layouts {wanted!r} leaves no layout; leave out a word, or raise --max-processes")
    return found


def _write_json(path: Path, config: Any, bounds: Any, rows: list[dict[str, Any]]) -> None:
    packages = ("torch", "deepspeed", "numpy")
    result = {
        "command": shlex.join(sys.argv),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in packages}},
        "config": plain(config),
        "bounds": dataclasses.asdict(bounds),
        "layouts": rows,
    }
    try:
        path.write_text(json_text(result, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path} ({os_reason(error)}); give another --json") from None
    print(f"written: {path}")


def _options() -> ArgumentParser:
    parser = ArgumentParser(description=DESCRIPTION)
    parser.add_argument(
        "--layouts", default="", help='only those with these words: "tp=2 pp=2", alternatives by comma: "tp=4, zero=3"'
    )
    parser.add_argument("--preset", help="a published model, shrunken, in place of the small GPT-2")
    parser.add_argument("--seq-len", type=int, help="tokens of a sequence of the preset (default 24)")
    parser.add_argument("--max-processes", type=int, default=8, help="only those with at most so many (default 8)")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of the layouts; the reference is always in fp32"
    )
    parser.add_argument("--json", type=Path, help="also write the results, with machine, versions and command, here")
    return parser


if __name__ == "__main__":
    run_cli(main)
