"""Files that grow while a run trains, and never end it: what the disk does not take waits for the next record."""

from __future__ import annotations

import contextlib
import os
from collections import deque
from pathlib import Path

from megagpt.files import open_own, os_reason

MAX_WAITING = 100_000  # records; then the oldest are lost


class AppendedFile:
    """A file of whole records. A record that cannot be written whole is taken back, and tried again with the next.

    problem: why records wait; None while none do.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, or makes it.  Raises OSError."""
        self.path = path
        self.problem: str | None = None
        self._file = open_own(path, "ab", buffering=0)
        self._size = self._file.seek(0, os.SEEK_END)
        self._waiting: deque[bytes] = deque(maxlen=MAX_WAITING)

    def append(self, record: bytes) -> None:
        """Add a record, behind those that wait."""
        self._waiting.append(record)
        text = b"".join(self._waiting)
        try:
            rest = memoryview(text)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.problem = os_reason(error)
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            return
        self.problem = None
        self._size += len(text)
        self._waiting.clear()

    def close(self) -> None:
        """Try once more; what waits then is lost."""
        if self._waiting:
            self.append(b"")
        with contextlib.suppress(OSError):
            self._file.close()
