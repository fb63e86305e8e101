"""The ops of this build, and a new one.

python -m megagpt.ops             which implementation each op has on a CPU and on a GPU, and why
python -m megagpt.ops new NAME    the four files of a new op, ready to run
"""

from __future__ import annotations

from pathlib import Path

from megagpt.errors import ArgumentParser, run_cli
from tools.new_op import EXAMPLE, FILES, NEXT, lay


def main() -> None:
    """Parse the command line and run it."""
    parser = ArgumentParser(prog="python -m megagpt.ops", description="The fused operators.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands.add_parser("list", help="which implementation each op has on a CPU and on a GPU, and why (the default)")
    new = commands.add_parser("new", help="lay the four files of a new op, ready to run")
    new.add_argument("name", metavar="NAME")
    arguments = parser.parse_args()
    if arguments.command == "new":
        new_op(arguments.name)
    else:
        list_ops()


def new_op(name: str) -> None:
    """Lay an op's files, and say what they are and what comes next."""
    root = Path.cwd()
    lay(root, name)
    for file, what in FILES.items():
        print(f"{file.format(name):{len(max(FILES, key=len)) + len(name)}}{what}")
    print(NEXT.format(example=EXAMPLE, name=name), end="")


def list_ops() -> None:
    """Print a line per op and device: what runs there, and why."""
    from megagpt.ops.library import DTYPES, kernel_status  # likewise
    from tests.ops.case import all_specs  # slow to import, and not needed to lay files

    rows = [
        (spec.op, device, *kernel_status(spec.op, device)) for spec in all_specs() if spec.branches for device in DTYPES
    ]
    width = max(len(op) for op, *_ in rows) + 2
    for op, device, what, why in [("op", "device", "runs", "why"), *rows]:
        print(f"{op:{width}}{device:8}{what:13}{why}")


if __name__ == "__main__":
    run_cli(main)
