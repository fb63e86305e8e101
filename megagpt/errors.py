"""The one error that a user can act on: shown as one line, without a traceback, exit code 2."""

from __future__ import annotations

import sys
from collections.abc import Callable


class UserError(Exception):
    """Something the user gave cannot work. The message says what was got, what was wanted, what to do."""


def run_cli(main: Callable[[], int | None]) -> None:
    """Run a command line tool: a `UserError` becomes `error: …` on stderr and exit code 2; Ctrl-C becomes 130."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
