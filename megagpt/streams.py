"""Standard streams as programs find them: closed, in an encoding that lacks our letters, with nobody who listens."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any, TextIO, cast


def ready_streams() -> None:
    """Have stdin, stdout and stderr, whatever was left of them, and in whatever encoding.

    A closed one becomes /dev/null: else the next file to be opened took its number, and got what libraries print.
    What an encoding lacks is written as an escape.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it takes the lowest free number
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  # for the whole program
        elif mode == "w" and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def endure_streams() -> None:
    """Let stdout and stderr fail in silence from now on: a full disk or a closed terminal ends no training."""
    sys.stdout, sys.stderr = cast(TextIO, Enduring(sys.stdout)), cast(TextIO, Enduring(sys.stderr))


class Enduring:
    """A stream that loses what it cannot write."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As a stream's."""
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """As a stream's."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
