"""Ending early, all ranks after the same step: signals, the time limit, a save that failed in the background."""

from __future__ import annotations

import signal
import time
from types import FrameType

import torch
import torch.distributed as dist

from megagpt.processes.signals import heard_signals

_TIME_IS_UP, _SAVE_FAILED = 1000, 1001  # above every signal's number: the highest reason of any rank counts


class Stopper:
    """Remembers what asks this process to end, and lets the ranks agree on it between two steps."""

    def __init__(self, limit_minutes: float | None) -> None:
        """The time limit counts from here. As a context manager it catches `heard_signals()`."""
        self._end_s = None if limit_minutes is None else time.monotonic() + limit_minutes * 60
        self._received = 0

    def __enter__(self) -> Stopper:
        self._before = {number: signal.signal(number, self._note) for number in heard_signals()}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def asked(self) -> bool:
        """Whether a signal has asked this process to end."""
        return self._received != 0

    def agree(self, save_failed: bool, device: torch.device) -> str | None:
        """Why all ranks end now; None where nothing asks any of them to.

        Comm: one all-reduce of a number.
        """
        reason = self._received
        if self._end_s is not None and time.monotonic() >= self._end_s:
            reason = _TIME_IS_UP
        highest = torch.tensor(_SAVE_FAILED if save_failed else reason, device=device)
        if dist.get_world_size() > 1:
            dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return _told(int(highest))

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGINT:  # whoever presses Ctrl-C again does not want to wait
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _told(reason: int) -> str | None:
    if reason == 0:
        return None
    if reason == _TIME_IS_UP:
        return "the time is up (--exit-after-minutes)"
    if reason == _SAVE_FAILED:
        return "a checkpoint could not be saved"
    return f"received {signal.Signals(reason).name}"
