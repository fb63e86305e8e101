"""What is said and written down when a run ends for the loss of one of its processes."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megagpt.files import os_reason
from megagpt.processes.watch.verdict import RankView


def say(message: str) -> None:
    """Print an error in one piece, past Python's buffers: the main thread may hold them."""
    _to_stderr(f"error: {message}\n")


def write_down(
    folder: Path | None, message: str, views: Sequence[RankView], records: Mapping[int, dict[str, Any] | None]
) -> None:
    """Keep what is known of a fault: folder/lost-TIME.json, a line a rank. records: of torch's flight recorder."""
    if folder is None:
        return
    ranks = ",\n".join(json.dumps(asdict(view), default=str) for view in views)
    flights = ",\n".join(f"{json.dumps(str(rank))}: {json.dumps(record)}" for rank, record in records.items())
    known = f'{{"message": {json.dumps(message)},\n"ranks": [\n{ranks}],\n"flight_recorder": {{\n{flights}}}}}\n'
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"lost-{time.strftime('%Y%m%d-%H%M%S')}.json").write_text(known)
    except OSError as error:
        _to_stderr(f"note: could not write to {folder} ({os_reason(error)})\n")


def _to_stderr(line: str) -> None:
    with suppress(OSError):  # its reader may have gone, and that must not be what ends this process
        os.write(2, line.encode(errors="backslashreplace"))


def end_process(code: int) -> None:
    """End this process from any thread, whatever the main one does."""
    # Flushing may wait for ever: for the main thread's lock on a buffer, or for a reader.
    flush = threading.Thread(target=_flush, daemon=True)
    flush.start()
    flush.join(timeout=1.0)
    os._exit(code)


def _flush() -> None:
    files: Sequence[Callable[[], None]] = (sys.stdout.flush, sys.stderr.flush)
    for flush_file in files:
        flush_file()
