"""Where a process is just now: the line of our code that its busy thread runs, and the collective it waits in.

Read from outside, by another thread, so that it works when the busy one hangs.
"""

from __future__ import annotations

import json
import linecache
import sys
import sysconfig
import threading
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch._C._distributed_c10d as c10d
import torch.distributed as dist
from torch.distributed import distributed_c10d

PACKAGE = str(Path(__file__).parents[1])
LIBRARIES = ("<", *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
MAX_FRAMES = 30  # of a stack that is written down
MAX_RECORDED = 20  # collectives, likewise


@dataclass(frozen=True)
class CallSite:
    """place: "megagpt/engine/engine.py:84 train_step". collective: "all_reduce", or None outside of one.

    instruction: what changes when the thread moves; of no other use. stack: of a failed one, innermost first.
    """

    place: str
    collective: str | None
    instruction: Hashable
    stack: Sequence[str] = ()


def call_site() -> CallSite:
    """Where this process's busy thread is. Cheap enough (some 0.1 ms) to be called 20 times a second."""
    top = busy_frame()
    collective, ours = None, None
    for frame in outwards(top):
        collective = collective or _collective(frame, top)
        if is_ours(frame.f_code.co_filename):
            ours = frame
            break
    shown = ours or top
    return CallSite(place(shown), collective, (id(top.f_code), top.f_lasti, id(shown.f_code), shown.f_lasti))


def stack() -> list[str]:
    """The places of the busy thread, innermost first."""
    return [place(frame) for frame, _ in zip(outwards(busy_frame()), range(MAX_FRAMES), strict=False)]


def failed_at(error: BaseException) -> CallSite:
    """Where an exception came from: the site to show for a thread that has left it already."""
    frames = list(_traceback_frames(error.__traceback__))
    collective = next((name for f in reversed(frames) if (name := _collective(f, frames[-1]))), None)
    shown = next((f for f in reversed(frames) if is_ours(f.f_code.co_filename)), frames[-1])
    return CallSite(place(shown), collective, id(error), [place(f) for f in reversed(frames)][:MAX_FRAMES])


def waits_for() -> list[int] | None:
    """The ranks without which the busy thread's collective does not go on; None outside of one.

    Not for frequent use: reading the arguments of a running function keeps them alive until it returns.
    """
    top = busy_frame()
    for frame in outwards(top):
        if _collective(frame, top) and frame.f_code.co_filename == distributed_c10d.__file__:
            return _partners(frame)
    return None


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


def busy_frame() -> FrameType:
    """The innermost frame of the thread that does the work.

    That is the main thread; but on a GPU the backward pass runs in threads of autograd, for which the main one waits.
    """
    frames = sys._current_frames()
    main_id = threading.main_thread().ident
    main = frames[main_id or 0]
    if main.f_code.co_name != "_engine_run_backward":
        return main
    for thread_id, frame in frames.items():
        outermost = list(outwards(frame))[-1]
        born_in_python = outermost.f_code.co_filename == threading.__file__
        if thread_id != main_id and not born_in_python:
            return frame
    return main


def place(frame: FrameType) -> str:
    """A frame as file:line function, the file relative to the folder of the package where it is inside."""
    path = frame.f_code.co_filename
    if path.startswith(PACKAGE):
        path = path[len(str(Path(PACKAGE).parent)) + 1 :]
    for library in LIBRARIES[1:]:
        path = path.removeprefix(library + "/")
    return f"{path}:{_line(frame)} {frame.f_code.co_name}"


def is_ours(path: str) -> bool:
    """Whether a file is of megagpt or of its user: not of an installed library."""
    return path.startswith(PACKAGE) or not path.startswith(LIBRARIES)


def outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and its callers."""
    while frame:
        yield frame
        frame = frame.f_back


def _collective(frame: FrameType, top: FrameType) -> str | None:
    """The collective that a frame is the call of; "wait" for one that was started earlier."""
    code = frame.f_code
    if code.co_filename == distributed_c10d.__file__ and not code.co_name.startswith("_"):
        return code.co_name
    if frame is top and ".wait()" in linecache.getline(code.co_filename, _line(frame)):
        return "wait"
    return None


def _line(frame: FrameType) -> int:
    return frame.f_lineno or frame.f_code.co_firstlineno  # Python has instructions that belong to no line


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


def _traceback_frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    while traceback:
        yield traceback.tb_frame
        traceback = traceback.tb_next
