"""Spikes: is a step's loss or gradient norm far above those of the steps before it? Pure functions, no torch.

Far is told in robust standard deviations: the median and the median absolute deviation of a window are not moved by
the outliers that are looked for. A trend widens the window's deviation, and a value that goes on with a linear one is
at 1.4 of them, so that neither warm-up nor a falling loss is a spike. The price: while the loss falls fast, only a
large jump is one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from megagpt.checkpoint.state import HistoryState

WINDOW = 128  # steps: a deviation from so many is known to a tenth
LEAST = 64  # steps before which nothing is judged: the loss falls fastest then, and the deviation is a guess
TO_SIGMA = 1.4826  # a median absolute deviation as a standard deviation, of normal noise

# What a deviation is at least, so that a curve with hardly any noise (one batch again and again) has no spikes of 1e-6.
LEAST_LOSS = 0.01  # nats: at a threshold of 10, a spike is 0.1 nats or more
LEAST_LOG_NORM = 0.1  # at a threshold of 10, a spike is e times the median or more


@dataclass(frozen=True)
class History:
    """What a step is compared with; a checkpoint keeps it, so that a run that goes on judges as if it had not ended.

    losses (nats), log_norms: of the last trained steps, oldest first. spiking: the last step was above the threshold.
    """

    losses: tuple[float, ...] = ()
    log_norms: tuple[float, ...] = ()
    spiking: bool = False

    def to_json(self) -> HistoryState:
        """As a checkpoint's state.json keeps it: bit for bit."""
        return HistoryState(losses=list(self.losses), log_norms=list(self.log_norms), spiking=self.spiking)

    @staticmethod
    def from_json(kept: HistoryState) -> History:
        """What `to_json` gave; an empty one of nothing."""
        losses, log_norms = tuple(kept.get("losses", ())), tuple(kept.get("log_norms", ()))
        return History(losses, log_norms, kept.get("spiking", False))


@dataclass(frozen=True)
class Spike:
    """A value far above the window. what: loss or gradient norm. zscore: in robust standard deviations."""

    what: str
    value: float
    median: float
    zscore: float


def judge(history: History, loss: float, grad_norm: float, threshold: float) -> tuple[History, Spike | None]:
    """The history with this step, and the spike that begins with it, if one does. threshold: 0 finds none.

    Both numbers must be finite. Of steps above the threshold one after the other only the first is told; they join
    the window too, so that a loss that stays where it is becomes the new normal after half a window.
    """
    log_norm = math.log(max(grad_norm, 1e-30))
    found = [
        Spike("loss", loss, median(history.losses), _zscore(history.losses, loss, LEAST_LOSS)),
        Spike("gradient norm", grad_norm, math.exp(median(history.log_norms)),
              _zscore(history.log_norms, log_norm, LEAST_LOG_NORM)),
    ] if len(history.losses) >= LEAST and threshold > 0 else []  # fmt: skip
    worst = max(found, key=lambda spike: spike.zscore, default=None)
    spiking = worst is not None and worst.zscore > threshold
    after = History((*history.losses, loss)[-WINDOW:], (*history.log_norms, log_norm)[-WINDOW:], spiking)
    return after, worst if spiking and not history.spiking else None


def _zscore(window: Sequence[float], value: float, least: float) -> float:
    middle = median(window)
    deviation = TO_SIGMA * median(abs(v - middle) for v in window)
    return (value - middle) / max(deviation, least)
