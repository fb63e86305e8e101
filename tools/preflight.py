#!/usr/bin/env python3
"""Look before a run whether these machines can do it: start it as the training, with the training's flags.

torchrun --nnodes 2 … tools/preflight.py --tp 2 --pp 2 --data-path my_text_document --save runs/mine
"""

from __future__ import annotations

from pathlib import Path

from megagpt.cli import parse_run_config
from megagpt.errors import ArgumentParser
from megagpt.train.pretrain import on_ranks, ranks_to_start, run_program

DESCRIPTION = """Check the machines before a run: same versions, settings and data on all ranks; who reaches whom;
speed of every rank, axis and link; memory; the run folder, its space and speed; clocks and limits.
  torchrun --nnodes 2 … tools/preflight.py --tp 2 --pp 2 --data-path my_text_document --save runs/mine

Start it by the launcher of the training, with the same flags. Exit code 2 when a check fails. Beside those flags:
  --json FILE      write findings and figures
  --wait-s N       seconds that ranks wait for each other; default 120
  --preset NAME    start from a published model: {presets}
  --config FILE    read a YAML file; may be given several times"""


def main() -> None:
    """Parse, start the ranks where no launcher has, check."""
    own, rest = _own_flags().parse_known_args()
    config = parse_run_config(rest, prog="tools/preflight.py", description=DESCRIPTION)
    on_ranks(
        ranks_to_start(config),
        "megagpt.processes.preflight.program",  # torch loads only now: a wrong flag is answered at once
        lambda program: program.preflight(config, own.json, own.wait_s),
    )


def _own_flags() -> ArgumentParser:
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--wait-s", type=float, default=120.0)
    return parser


if __name__ == "__main__":
    run_program(main)
