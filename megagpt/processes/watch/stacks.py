"""The stacks of all threads of this process, as they are at one moment.

Another thread's frames must be followed without a pause: between two steps it may go on, and leave the frame that the
next step starts from (seen: something that was no frame). So the whole walk is one call of C code, iterators of the
standard library inside each other, in which Python does not switch threads. faulthandler would do it in one call as
well, but does not lock the list of threads: it crashed when one had just been born.
"""

from __future__ import annotations

import gc
import sys
from itertools import accumulate, chain, islice, repeat
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

MAX_LINES = 100


class Line(NamedTuple):
    """A line of a function that is running; 0 where Python is between two lines."""

    file: str
    number: int
    function: str


def stacks() -> dict[int, list[Line]]:
    """By the identity of a thread: its lines, innermost first, MAX_LINES at most."""
    return {thread: lines for thread in sys._current_frames() if (lines := stack_of(thread))}


def stack_of(thread: int) -> list[Line]:
    """The lines of one thread, innermost first; none where it has ended."""
    top = islice(map(itemgetter(thread), iter(sys._current_frames, None)), 1)
    frames = accumulate(chain(top, repeat("f_back", MAX_LINES - 1)), getattr)
    found: list[tuple[Any, int | None]] = []
    collects = gc.isenabled()
    gc.disable()  # it may run Python code, which may switch threads
    try:
        found.extend(map(attrgetter("f_code", "f_lineno"), frames))
    except (AttributeError, KeyError):
        pass  # the outermost frame's f_back is None; or there is no such thread
    finally:
        if collects:
            gc.enable()
    return [Line(code.co_filename, number or 0, code.co_name) for code, number in found]
