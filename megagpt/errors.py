"""The one error that a user can act on: shown as one line, without a traceback, exit code 2."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

EXIT_USER = 2  # what the user gave cannot work; the message says why
EXIT_PEER_LOST = 69  # another process of the run died, stopped or hung
EXIT_STOPPED = 75  # asked to stop, and saved: go on with --auto-resume

# A launcher ends all ranks as soon as one has ended: the silent ones wait until the one that speaks has spoken.
SILENT_S = 5.0


class UserError(Exception):
    """Something the user gave cannot work. The message says what was got, what was wanted, what to do.

    speaks: whether this process prints it. Of several ranks that fail together exactly one does.
    code: the exit code that it becomes.
    """

    def __init__(self, message: str, speaks: bool = True, code: int = EXIT_USER) -> None:
        super().__init__(message)
        self.speaks, self.code = speaks, code


def one_line(text: str) -> str:
    """The text with what would break the line, or play with the terminal, written as escapes: a key or a file name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Stopped(Exception):  # noqa: N818  # it is no error
    """The run was asked to end early, and saved what it had. The message, told by one rank, says where."""

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


def run_cli(main: Callable[[], int | None], speaks: bool = True) -> None:
    """Run a command line tool: a `UserError` becomes `error: …` on stderr and exit code 2, `Stopped` 75, Ctrl-C 130.

    speaks: False on ranks whose errors another rank prints as well.
    """
    try:
        sys.exit(main() or 0)
    except UserError as error:
        if error.speaks and (speaks or type(error) is not UserError):  # a subclass knows better who speaks
            print(f"error: {one_line(str(error))}", file=sys.stderr)
        else:
            time.sleep(SILENT_S)
        sys.exit(error.code)
    except Stopped as stop:
        if stop.speaks:
            print(stop, flush=True)
        sys.exit(EXIT_STOPPED)
    except BrokenPipeError:  # whoever read our output has seen enough: `… --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
