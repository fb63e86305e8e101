#!/usr/bin/env python3
"""Replace the dense MLP matrices of a trained model by products of fewer parameters, and say what that costs and saves.

  python tools/factorize.py runs/a --mlp low_rank --mlp-rank 64 --out runs/b
  python tools/factorize.py runs/a --mlp monarch --mlp-blocks 4 --out runs/b --fine-tune-steps 200
  python tools/factorize.py runs/a --mlp butterfly --out runs/b --fine-tune-steps 200 -- --lr 1e-4 --tp 2

Each matrix is projected onto the nearest one of its kind (for butterfly onto a near one: docs/factorised.md). The new
run folder has a checkpoint of step 0, whose other weights are as they were, and a config.yaml, to train on from:

  python examples/pretrain_gpt.py --config runs/b/config.yaml --load runs/b --train-steps 1000

--fine-tune-steps N runs that command here, with what stands behind -- added, and measures the loss again.
Which kind: low_rank is two plain products. monarch loses less than low_rank of as many parameters where singular values
fall slowly; twice the blocks have half the parameters. butterfly has the fewest by far, to be trained rather than
projected.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megagpt.checkpoint import folders
from megagpt.checkpoint.state import read_state
from megagpt.cli import read_config
from megagpt.config import ModelConfig
from megagpt.config.values import Split
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.errors import ArgumentParser, UserError, home_expanded, run_cli
from megagpt.files import json_text
from megagpt.inventory.layers import layers
from megagpt.model.mlp import MLPS

KIND = ("mlp", "mlp_rank", "mlp_blocks")
PRETRAIN = Path(__file__).parents[1] / "examples" / "pretrain_gpt.py"


def main(argv: Sequence[str] | None = None) -> None:
    """Project, measure, and fine-tune if asked to."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    args, pretrain_flags = _parser().parse_args(words[:end]), words[end + 1 :]
    source, given = folders.find(args.checkpoint), {name: getattr(args, name) for name in KIND}
    dense = read_config(read_state(source).config, f"{source}/state.json")
    config = dataclasses.replace(dense, model=dataclasses.replace(dense.model, **given))  # raises what does not fit
    if args.fine_tune_steps == 0 and pretrain_flags:
        raise UserError(f"got {pretrain_flags[0]} behind --, which is for fine-tuning; add --fine-tune-steps")
    print("loading torch ...", file=sys.stderr)
    from megagpt.adapt.factorise import step_times, write_factorised  # seconds, which a wrong flag should not take

    errors = write_factorised(source, args.out, given)
    report: dict[str, Any] = {
        "source": str(source),
        "out": str(args.out),
        "mlp": given,
        "relative_error": {error.name: error.relative_error for error in errors},
        "dense": sizes(dense.model),
        "factorised": sizes(config.model),
    }
    _show_errors(report["relative_error"])
    for name, seconds in step_times({"dense": dense.model, "factorised": config.model}, args.micro_batch_size).items():
        report[name]["step_time_s"] = seconds
    prefixes = args.data_path or list(dense.data.data_path.prefixes)
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    if datasets:
        report["dense"]["validation_loss"] = _loss(source, datasets, args)
        report["factorised"]["validation_loss"] = _loss(args.out, datasets, args)
    if args.fine_tune_steps:
        _fine_tune(args, prefixes, pretrain_flags)
        tuned = {name: report["factorised"][name] for name in ("parameters", "mlp_parameters", "flops_per_token")}
        tuned |= {
            "step_time_s": report["factorised"]["step_time_s"],
            "validation_loss": _loss(args.out, datasets, args),
        }
        report["fine-tuned"] = tuned
    _show(report)
    if args.json:
        args.json.write_text(json_text(report, indent=1) + "\n", encoding="utf-8")


def sizes(model: ModelConfig) -> dict[str, float]:
    """Parameters, those of the MLPs' matrices among them, and forward matmul FLOPs of a token."""
    listed, mlp = layers(model), MLPS[model.mlp](model)
    of_a_block = [p.size for p in [*mlp.up().values(), *mlp.down().values()] if p.kind != "vector"]
    return {
        "parameters": sum(layer.params for layer in listed),
        "mlp_parameters": model.n_layers * sum(of_a_block),
        "flops_per_token": sum(layer.flops_per_token for layer in listed),
    }


def _loss(checkpoint: Path, datasets: Sequence[IndexedDataset], args: argparse.Namespace) -> float:
    """Mean nats per token over the validation share of all datasets."""
    from megagpt.evaluate.split import evaluate  # after the flags: this takes seconds
    from megagpt.generate.trained import open_trained  # likewise

    total, n_tokens = 0.0, 0
    with open_trained(checkpoint) as trained:
        for dataset in datasets:
            split = args.split or trained.config.data.split
            found = evaluate(trained, dataset, split=split, which="validation", max_tokens=args.max_tokens)
            total, n_tokens = total + found.loss * found.n_tokens, n_tokens + found.n_tokens
    return total / n_tokens


def _fine_tune(args: argparse.Namespace, prefixes: Sequence[str], flags: Sequence[str]) -> None:
    """Train on, by the program that trains anything."""
    command = [sys.executable, str(PRETRAIN), "--config", str(args.out / "config.yaml"), "--load", str(args.out)]
    command += ["--train-steps", str(args.fine_tune_steps), "--data-path", *prefixes, *flags]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"fine-tuning failed, see above; what it began with is whole: {args.out}")


def _show_errors(relative_error: dict[str, float]) -> None:
    """A line a layer: how far its matrices are from the dense ones."""
    table = _table("relative error", "up", "down")
    by_layer: dict[str, list[float]] = {}
    for name, error in relative_error.items():
        by_layer.setdefault(name.rsplit(".", 1)[0], []).append(error)
    for layer, found in by_layer.items():
        table.add_row(layer, *(f"{error:.4f}" for error in found))
    _print(table)


def _show(report: dict[str, Any]) -> None:
    """What was measured, side by side."""
    columns = [name for name in ("dense", "factorised", "fine-tuned") if name in report]
    table = _table("", *columns)
    rows = {
        "parameters": "parameters",
        "mlp_parameters": "of them in MLP matrices",
        "flops_per_token": "FLOPs of a token, forward",
        "step_time_s": "step, ms",
        "validation_loss": "validation loss",
    }
    for key, label in rows.items():
        cells = [report[name].get(key) for name in columns]
        if all(cell is not None for cell in cells):
            table.add_row(label, *(_cell(key, cell) for cell in cells))
    _print(table)


def _cell(key: str, value: float) -> str:
    if key == "step_time_s":
        return f"{1e3 * value:.1f}"
    if key == "validation_loss":
        return f"{value:.4f} (perplexity {math.exp(min(value, 700)):.4g})"
    return f"{value:,}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        usage="%(prog)s CKPT --mlp KIND --out DIR [options] [-- FLAGS of examples/pretrain_gpt.py, to fine-tune by]",
        description=__doc__,
    )
    parser.add_argument(
        "checkpoint", metavar="CKPT", type=home_expanded, help="RUN, RUN@best, RUN@STEP, or the folder of a checkpoint"
    )
    parser.add_argument("--mlp", required=True, choices=("low_rank", "monarch", "butterfly"), help="the new kind")
    parser.add_argument("--mlp-rank", type=int, help="rank of low_rank matrices")
    parser.add_argument("--mlp-blocks", type=int, help="blocks of each factor of monarch matrices")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new run folder to write")
    parser.add_argument(
        "--data-path", nargs="+", metavar="P", type=home_expanded, help="text for the losses (default: the run's own)"
    )
    parser.add_argument("--split", type=Split.parse, help="shares for train, validation, test (default: the run's)")
    parser.add_argument("--max-tokens", type=int, help="measure the loss over at most so many (default: all)")
    parser.add_argument("--micro-batch-size", type=int, default=4, help="of the steps that are timed (default: 4)")
    parser.add_argument("--fine-tune-steps", type=int, default=0, metavar="N", help="train on for so many steps")
    parser.add_argument("--json", type=Path, help="also write what was measured here")
    return parser


if __name__ == "__main__":
    run_cli(main)
