#!/usr/bin/env python3
"""The mean of the weights of a run's last checkpoints, as a checkpoint to evaluate, generate from and export.

  python tools/average_checkpoints.py runs/a --last 4               writes runs/a/mean-of-last-4
  python tools/average_checkpoints.py runs/a --last 4 --out mean

A shorthand for `tools/checkpoint.py average`, which also takes checkpoints one by one, or their moving averages.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from checkpoint import main as checkpoint_tool

from megagpt.errors import ArgumentParser, run_cli


def main(argv: Sequence[str] | None = None) -> int:
    """Write the mean; the exit code."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of a run")
    parser.add_argument("--last", type=int, required=True, metavar="N", help="how many of its newest checkpoints")
    parser.add_argument("--out", type=Path, metavar="DIR", help="new folder to write (default: RUN/mean-of-last-N)")
    a = parser.parse_args(argv)
    out = a.out or a.run / f"mean-of-last-{a.last}"
    return checkpoint_tool(["average", str(a.run), "--last", str(a.last), "--out", str(out)])


if __name__ == "__main__":
    run_cli(main)
