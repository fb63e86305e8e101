"""What asks a run to end: signals, and the end of the process that started it."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

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
    """Follow a launcher that lives as long as its ranks: torchrun or DeepSpeed's. A shell need not.

    DeepSpeed's is, on one machine, itself started by the command `deepspeed`, whose end counts too.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        follow_parent()
    if "CROSS_RANK" in os.environ:  # DeepSpeed's
        follow_parent()
        with suppress(OSError):  # no Linux, or an old one; or the launcher has ended already
            above = int(Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()[1])
            if is_deepspeed(Path(f"/proc/{above}/cmdline").read_text(errors="replace").split("\0")):
                follow_process(above)


def is_deepspeed(words: Sequence[str]) -> bool:
    """Whether a process of this command line is `deepspeed`, by any of its names, and no shell of another host."""
    names = [Path(word).name.removesuffix(".pt") for word in words[:3]]
    return "deepspeed" in names or "ds" in names or any(name.endswith(".launcher.runner") for name in names)


def follow_process(pid: int) -> None:
    """Be sent SIGTERM when that process, which need not be the parent, has ended, however it ended (on Linux).

    Raises OSError where it has ended already.
    """
    ended = select.poll()
    ended.register(os.pidfd_open(pid), select.POLLIN)

    def wait() -> None:
        ended.poll()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
