"""The stacks of all threads of this process, as they are at one moment.

By faulthandler, which writes them down in one call: no thread runs meanwhile. Following the frames of a running thread
from Python (`sys._current_frames`) is no way to do it: between two steps it may go on and leave the frame that the next
step starts from, which once in some 200 runs of ours gave something that was no frame.
"""

from __future__ import annotations

import faulthandler
import os
import re
from typing import NamedTuple

_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)")
_LINE = re.compile(r'  File "(.*)", line (\d+|\?\?\?) in (.*)')


class Line(NamedTuple):
    """A line of a function that is running; 0 where Python is between two lines."""

    file: str
    number: int
    function: str


def stacks() -> dict[int, list[Line]]:
    """By the identity of a thread: its lines, innermost first, 100 at most."""
    descriptor = os.memfd_create("stacks")
    try:
        faulthandler.dump_traceback(descriptor, all_threads=True)
        os.lseek(descriptor, 0, os.SEEK_SET)
        text = os.read(descriptor, 1 << 22).decode(errors="replace")
    finally:
        os.close(descriptor)
    return parse(text)


def parse(text: str) -> dict[int, list[Line]]:
    """What faulthandler wrote. Threads without a line of Python are left out."""
    found: dict[int, list[Line]] = {}
    lines: list[Line] = []
    for row in text.splitlines():
        if thread := _THREAD.match(row):
            lines = found[int(thread[1], 16)] = []
        elif line := _LINE.fullmatch(row):
            lines.append(Line(line[1], 0 if line[2] == "???" else int(line[2]), line[3]))
    return {thread: lines for thread, lines in found.items() if lines}
