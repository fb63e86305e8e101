"""Where tables are shown: a terminal at its own width, a log 80 columns wide and without blanks at line ends."""

from __future__ import annotations

import sys

from rich.console import Console, RenderableType

LOG_WIDTH = 80  # of tables, where there is no terminal to ask


def console_here() -> Console:
    """A console on standard output."""
    return Console(width=None if sys.stdout.isatty() else LOG_WIDTH, highlight=False)


def show(console: Console, what: RenderableType) -> None:
    """Print a table; in a log without the blanks that rich fills its lines up with."""
    if console.is_terminal:
        console.print(what)
        return
    with console.capture() as captured:
        console.print(what)
    console.file.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))
    console.file.flush()
