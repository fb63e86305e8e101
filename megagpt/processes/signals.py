"""What asks a run to end: signals, and the end of the process that started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# A scheduler's, a person's, a scheduler's warning, a terminal that was closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1


def heard_signals() -> list[signal.Signals]:
    """SIGNALS, but for SIGHUP where `nohup` has switched it off."""
    return [n for n in SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]


def follow_parent() -> None:
    """Be sent SIGTERM when the process that started this one has ended, however it ended (on Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def follow_launcher() -> None:
    """Follow a launcher that lives as long as its ranks: torchrun or DeepSpeed's. A shell need not."""
    if "TORCHELASTIC_RUN_ID" in os.environ or "CROSS_RANK" in os.environ:  # the second is DeepSpeed's
        follow_parent()
