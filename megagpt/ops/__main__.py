"""The ops of this build, and a new one.

python -m megagpt.ops             which implementation each op has on a CPU and on a GPU, and why
python -m megagpt.ops new NAME    the four files of a new op, ready to run: in the root of a checkout
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.ops.library import DTYPES, declare, kernel_status, op_names


def main() -> int:
    """Parse the command line and run it."""
    parser = ArgumentParser(prog="python -m megagpt.ops", description="The fused operators.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("list", help="which implementation each op has on a CPU and on a GPU, and why (the default)")
    new = commands.add_parser("new", help="lay the four files of a new op, ready to run")
    new.add_argument("name", metavar="NAME")
    arguments = parser.parse_args()
    if arguments.command == "new":
        return new_op(arguments.name)
    list_ops()
    return 0


def new_op(name: str) -> int:
    """Let the scaffold of this checkout lay an op's files; returns its exit code."""
    if not Path("tools/new_op.py").is_file():
        raise UserError(
            f"got {Path.cwd()}, which has no tools/new_op.py, wanted a checkout of megagpt; run this in its root"
        )
    return subprocess.run([sys.executable, "-m", "tools.new_op", name], check=False).returncode


def list_ops() -> None:
    """Print a line per op and device: what runs there, and why."""
    declare(op_names())
    rows = [(op, device, *kernel_status(op, device)) for op in op_names() for device in DTYPES]
    width = max(len(op) for op, *_ in rows) + 2
    for op, device, what, why in [("op", "device", "runs", "why"), *rows]:
        print(f"{op:{width}}{device:8}{what:13}{why}")


if __name__ == "__main__":
    run_cli(main)
