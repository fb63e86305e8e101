"""Where a process is just now: the line of our code that its busy thread runs, the collective it waits in, its step.

Read from outside, by another thread, so that it works when the busy one hangs. A thread whose collective has failed is
still where it failed while the error is only handed on: through torch's logging, `with` blocks, and the watch itself,
whose own lines are never a place. Another thread's frames must be followed
without a pause: between two steps it may go on, and leave the frame that the next step starts from (seen: something
that was no frame). So the whole walk is one call of C code, iterators of the standard library inside each other, in
which Python does not switch threads. faulthandler would do it in one call as well, but does not lock the list of
threads: it crashed when one had just been born.
"""

from __future__ import annotations

import contextlib
import gc
import json
import linecache
import sys
import sysconfig
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain, dropwhile, islice, repeat
from operator import attrgetter, itemgetter
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch._C._distributed_c10d as c10d
import torch.distributed as dist
from torch.distributed import c10d_logger, distributed_c10d

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


PACKAGE = str(Path(__file__).parents[2])
WATCH = str(Path(__file__).parent)
LIBRARIES = ("<", *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
HANDING_ON = {
    (contextlib.__file__, "__exit__"),
    (c10d_logger.__file__, "wrapper"),
    (str(Path(PACKAGE) / "processes/start.py"), "distributed"),
}
MAX_FRAMES = 30  # of a stack that is written down
MAX_RECORDED = 20  # collectives, likewise


@dataclass(frozen=True)
class CallSite:
    """place: "megagpt/train/step/engine.py:84 train_step". collective: "all_reduce", or None outside of one.

    lines: the whole stack, innermost first; it changes when the thread moves.
    """

    place: str
    collective: str | None
    lines: Sequence[Line]

    @property
    def stack(self) -> list[str]:
        """The places, innermost first."""
        return [place(line) for line in self.lines[:MAX_FRAMES]]


def call_site() -> CallSite:
    """Where this process's busy thread is. Cheap enough (some 0.1 ms) to be called 20 times a second."""
    thread = _busy_thread()
    lines = stack_of(thread)
    if _hands_on(lines):
        lines = _failed_at(thread, lines) or lines
    return _site(lines)


def _hands_on(lines: Sequence[Line]) -> bool:
    """Whether a thread may have nothing to do but to let an error pass."""
    above = lines[: _first_of_ours(lines)]
    return not any(map(_is_c10d, above)) and any(
        _is_of_the_watch(line) or (line.file, line.function) in HANDING_ON for line in above
    )


def _failed_at(thread: int, lines: Sequence[Line]) -> list[Line]:
    """The stack of a thread, whose lines are these now, at the error that it handles; none where it handles none."""
    found: Any = sys._current_exceptions().get(thread)
    error = found[1] if isinstance(found, tuple) else found  # a tuple until Python 3.12
    if error is None:
        return []
    frames = traceback.walk_tb(error.__traceback__)
    left = [Line(frame.f_code.co_filename, number, frame.f_code.co_name) for frame, number in frames][::-1]
    callers = dropwhile(lambda line: (line.file, line.function) != (left[-1].file, left[-1].function), lines)
    return [*left, *islice(callers, 1, None)]


def waits_for() -> list[int] | None:
    """The ranks without which the busy thread's collective does not go on; None outside of one, or with no ranks yet.

    Not for frequent use: reading the arguments of a running function keeps them alive until it returns.
    """
    if not dist.is_initialized() or not any(_is_c10d(line) for line in busy_stack()):
        return None
    frame: FrameType | None = sys._current_frames()[_busy_thread()]  # it stands still, in C
    while frame and not _is_c10d(Line(frame.f_code.co_filename, 0, frame.f_code.co_name)):
        frame = frame.f_back
    return _partners(frame) if frame else None


def enqueued() -> tuple[str, list[int]] | None:
    """The oldest collective that this process has started and not finished, and the ranks that share it.

    From torch's flight recorder, which is on by default. With NCCL, where the host goes on while a collective waits on
    the device, nothing else tells. Collectives only: gloo does not record sends and receives.
    """
    record = _unfinished()
    for entry in record.get("entries", []):
        if not entry["retired"]:
            group = distributed_c10d._resolve_process_group(entry["process_group"][0])
            return entry["profiling_name"], dist.get_process_group_ranks(group)
    return None


def flight_record() -> dict[str, Any]:
    """What torch's flight recorder knows of this process: how far each group came, and what is unfinished."""
    record = _unfinished()
    return {"groups": record.get("pg_status"), "unfinished": record.get("entries", [])[:MAX_RECORDED]}


def busy_stack() -> list[Line]:
    """The stack of the thread that does the work, innermost first.

    That is the main thread; but on a GPU the backward pass runs in threads of autograd, for which the main one waits.
    """
    return stack_of(_busy_thread())


def _busy_thread() -> int:
    main = threading.main_thread().ident or 0
    if stack_of(main)[0].function != "_engine_run_backward":
        return main
    others = (i for i, lines in stacks().items() if i != main and lines[-1].file != threading.__file__)
    return next(others, main)


def place(line: Line) -> str:
    """A line as file:line function, the file relative to the folder of the package where it is inside."""
    path = line.file
    if path.startswith(PACKAGE):
        path = path[len(str(Path(PACKAGE).parent)) + 1 :]
    for library in LIBRARIES[1:]:
        path = path.removeprefix(library + "/")
    return f"{path}:{line.number} {line.function}"


def _is_ours(line: Line) -> bool:
    """Whether a line is megagpt's or its user's: not the watch's, nor an installed library's."""
    if (line.file, line.function) in HANDING_ON or _is_of_the_watch(line):
        return False
    return line.file.startswith(PACKAGE) or not line.file.startswith(LIBRARIES)


def _is_of_the_watch(line: Line) -> bool:
    return line.file.startswith(WATCH)


def _first_of_ours(lines: Sequence[Line]) -> int:
    """The index of our innermost line; their number where none is ours."""
    return next((i for i, line in enumerate(lines) if _is_ours(line)), len(lines))


def _site(lines: list[Line]) -> CallSite:
    """What a stack says: our innermost line, and the collective that was called from it."""
    n_theirs = _first_of_ours(lines)
    above = lines[: n_theirs + 1]
    shown = lines[n_theirs if n_theirs < len(lines) else 0]
    collective = next((line.function for line in above if _is_c10d(line)), None)
    if collective is None and ".wait()" in linecache.getline(lines[0].file, lines[0].number):
        collective = "wait"  # for one that was started earlier
    return CallSite(place(shown), collective, tuple(lines))


def _is_c10d(line: Line) -> bool:
    """Whether a line is in the body of a collective of torch.distributed."""
    return line.file == distributed_c10d.__file__ and not line.function.startswith("_")


def _partners(frame: FrameType) -> list[int]:
    arguments = frame.f_locals
    group = arguments.get("group")
    for name in ("src", "dst"):
        if frame.f_code.co_name in ("send", "recv") and isinstance(arguments.get(name), int):
            return [arguments[name]]
    members = dist.get_process_group_ranks(group or dist.group.WORLD)
    return [rank for rank in members if rank != dist.get_rank()]


def _unfinished() -> dict[str, Any]:
    return json.loads(c10d._dump_fr_trace_json(onlyActive=True))  # pyright: ignore[reportAttributeAccessIssue]


MAX_GAP_S = 1.0  # more between two looks is sleep of the looking thread, and counts for neither work nor waiting


class Activity:
    """Told of steps by the main thread, looked at by the watch thread.

    busy_s, waiting_s: inside of steps, outside and inside of collectives. On a GPU they mean nothing: the host thread
    does not wait in a collective there.
    """

    def __init__(self) -> None:
        self._step: int | None = None
        self._in_step = False
        self._n_marks = 0
        self._site = call_site()
        self._moved_at = self._looked_at = 0.0
        self._busy_s = self._waiting_s = 0.0
        self._at_mark = (0, 0.0, 0.0)
        self._n_looked_marks = -1

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Mark a training step, from 1, while it lasts."""
        self._step, self._in_step = step, True
        self._n_marks += 1
        yield
        self._in_step = False
        self._n_marks += 1
        self._at_mark = (step, self._busy_s, self._waiting_s)

    def look(self, now_s: float) -> None:
        """See where the busy thread is. now_s: a clock that does not jump."""
        site = call_site()
        if site.lines != self._site.lines or self._n_marks != self._n_looked_marks:
            self._moved_at = now_s
        gap_s = now_s - self._looked_at
        if self._in_step and gap_s < MAX_GAP_S:
            if site.collective:
                self._waiting_s += gap_s
            else:
                self._busy_s += gap_s
        self._site, self._looked_at, self._n_looked_marks = site, now_s, self._n_marks

    def report(self) -> dict[str, Any]:
        """As it was at the last look."""
        steps_done, busy_s, waiting_s = self._at_mark
        return {
            "step": self._words(),
            "place": self._site.place,
            "collective": self._site.collective,
            "still_s": self._looked_at - self._moved_at,
            "steps_done": steps_done,
            "busy_s": busy_s,
            "waiting_s": waiting_s,
        }

    def _words(self) -> str:
        if self._step is None:
            return "before its first step"
        return f"in step {self._step}" if self._in_step else f"after step {self._step}"
