"""Predicted against measured: errors, ranks, failures; and the constants, fitted on half of the rows. No torch.

A row's half follows from its GPU, the sizes of its model and of its layout: what was measured twice is on one side.
"""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from megagpt.plan.footprint import fits, footprint
from megagpt.plan.machine import Constants, constants_of
from megagpt.plan.rows.row import Row
from megagpt.plan.step import step_time

MEMORY_CONSTANTS = ("kept", "logit_bytes", "buffers_gib")
TIME_CONSTANTS = tuple(
    field.name for field in fields(Constants) if field.name not in (*MEMORY_CONSTANTS, "usable")
)  # fmt: skip
_SHARES = {"matrix", "flash", "memory", "fp8", "nvlink", "network", "tp_hidden", "dp_hidden", "misaligned"}
_HOLD = 1e-3  # how firmly the log of a constant is held to that of Constants
_BEGIN = {"b200": "h100"}  # types of few rows begin with what another has
_LARGE = 0.03  # errors above it count by their size only
_NOISE = 0.02  # by which two runs of one layout differ
_PER_SOURCE = 70  # rows of a source that a fit looks at


@dataclass(frozen=True)
class Errors:
    """Of a set of rows: how many, the median and the 90th percentile of |predicted / measured - 1|, the median of
    predicted / measured - 1, in per cent.
    """

    rows: int
    median: float
    p90: float
    bias: float

    @staticmethod
    def of(ratios: Sequence[float]) -> Errors:
        """ratios: predicted / measured."""
        if not ratios:
            return Errors(0, math.nan, math.nan, math.nan)
        off = np.array(ratios) - 1
        size = np.abs(off)
        return Errors(
            len(off), 100 * float(np.median(size)), 100 * float(np.quantile(size, 0.9)), 100 * float(np.median(off))
        )


def is_seen(row: Row) -> bool:
    """Whether the fit may look at it."""
    model, layout = row.job.model, row.job.layout
    sizes = (model.d_model, model.n_layers, model.seq_len, layout.gpus, layout.tp, layout.pp, layout.cp)
    words = f"{row.job.machine.name} {sizes} {layout.micro_batch} {layout.global_batch} {layout.zero}"
    return zlib.crc32(words.encode()) % 2 == 0


def timed(rows: Iterable[Row]) -> list[Row]:
    """Rows with a time of a healthy machine."""
    return [row for row in rows if row.step_s and not row.sick]


def time_ratios(rows: Iterable[Row]) -> list[float]:
    """Predicted over measured seconds of a step."""
    return [step_time(row.job).seconds / row.step_s for row in rows if row.step_s]


def memory_ratios(rows: Iterable[Row]) -> list[float]:
    """Predicted over measured bytes of a rank."""
    return [footprint(row.job).total / 2**30 / row.memory_gib for row in rows if row.memory_gib]


def kendall_tau(predicted: Sequence[float], measured: Sequence[float], tie: float = 0.0) -> float:
    """Rank correlation: pairs in the same order less pairs in the other, over all (Kendall 1938, tau-b with ties).

    tie: share by which two measured values must differ to be in an order.
    """
    x, y = np.array(predicted), np.array(measured)
    above = np.triu_indices(len(x), 1)
    dx, dy = np.sign(x[:, None] - x)[above], (y[:, None] - y)[above]
    dy = np.where(np.abs(dy) > tie * np.maximum(y[:, None], y)[above], np.sign(dy), 0)
    dx = np.where(dy == 0, 0, dx) if tie else dx
    pairs = math.sqrt(float(np.sum(dx != 0)) * float(np.sum(dy != 0)))
    return float(np.sum(dx * dy)) / pairs if pairs else math.nan


def sweep_taus(rows: Sequence[Row], at_least: int = 5) -> dict[str, float]:
    """Rank correlation of tokens per second and GPU, within each sweep of at least so many rows.

    Pairs that were measured within `_NOISE` of each other have no order: runs that were repeated differ by as much.
    """
    sweeps: dict[str, list[Row]] = {}
    for row in rows:
        sweeps.setdefault(row.sweep, []).append(row)
    found = {}
    for name, members in sweeps.items():
        if len(members) >= at_least:
            predicted = [_rate(row, step_time(row.job).seconds) for row in members]
            measured = [_rate(row, row.step_s or math.nan) for row in members]
            found[name] = kendall_tau(predicted, measured, _NOISE)
    return {name: tau for name, tau in found.items() if not math.isnan(tau)}


def _rate(row: Row, seconds: float) -> float:
    return row.job.layout.global_batch * row.job.model.seq_len / seconds / row.job.layout.gpus


def failures(rows: Iterable[Row]) -> tuple[float | None, float | None]:
    """Precision and recall of "does not fit" against runs that failed; None where a table keeps no failures."""
    known = [row for row in rows if row.failed is not None]
    said = [not fits(row.job) for row in known]
    right = sum(s and bool(row.failed) for s, row in zip(said, known, strict=True))
    failed = sum(bool(row.failed) for row in known)
    if not failed:
        return None, None
    return (right / sum(said) if any(said) else None), right / failed


def summary(rows: Sequence[Row]) -> dict[str, float | int | None]:
    """What the last line of a check says: of healthy rows with a time; failures of all."""
    healthy = timed(rows)
    errors, taus = Errors.of(time_ratios(healthy)), list(sweep_taus(healthy).values())
    precision, recall = failures(rows)
    return {
        "rows": errors.rows,
        "median_error_percent": _rounded(errors.median, 2),
        "p90_error_percent": _rounded(errors.p90, 2),
        "kendall_tau": _rounded(sum(taus) / len(taus), 3) if taus else None,
        "oom_precision": _rounded(precision, 3),
        "oom_recall": _rounded(recall, 3),
    }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None or math.isnan(value) else round(value, digits)


def fit(rows: Sequence[Row], say: Callable[[str], None]) -> dict[str, Constants]:
    """Constants of each GPU type from rows that `is_seen`: the least sum of squares of log(predicted / measured), of
    which large ones count by their size only (Huber 1964); each source counts by the root of its rows.
    """
    found = {}
    for name in dict.fromkeys(row.job.machine.constants_name for row in rows):
        ours = [row for row in rows if row.job.machine.constants_name == name and is_seen(row)]
        start = found.get(_BEGIN.get(name, ""), constants_of(name))
        with_time = _sampled(timed(ours))
        fitted = _fitted(start, TIME_CONSTANTS, with_time, _log_time, say) if with_time else start
        with_memory = [row for row in ours if row.memory_gib and row.failed is not None]
        if with_memory:
            fitted = _fitted(fitted, MEMORY_CONSTANTS, _sampled(with_memory), _log_memory, say)
            fitted = _usable(fitted, [row for row in ours if row.failed is not None])
        found[name] = fitted
        say(f"{name}: fitted on {len(with_time)} times and {len(with_memory)} memories")
    return found


def _sampled(rows: Sequence[Row]) -> list[Row]:
    by_source: dict[str, list[Row]] = {}
    for row in rows:
        by_source.setdefault(row.source, []).append(row)
    return [row for members in by_source.values() for row in members[:: max(1, len(members) // _PER_SOURCE)]]


def _log_time(row: Row) -> float:
    return math.log(step_time(row.job).seconds / (row.step_s or math.nan))


def _log_memory(row: Row) -> float:
    return math.log(footprint(row.job).total / 2**30 / (row.memory_gib or math.nan))


def at(row: Row, constants: Constants) -> Row:
    """The same row, predicted with these constants."""
    return replace(row, job=replace(row.job, machine=row.job.machine.with_constants(constants)))


def _fitted(
    start: Constants,
    names: Sequence[str],
    rows: Sequence[Row],
    log_ratio: Callable[[Row], float],
    say: Callable[[str], None],
    rounds: int = 20,
) -> Constants:
    """Pattern search (Hooke and Jeeves 1961): each constant in turn a step up or down, where that lowers the loss; if
    neither does, its step is halved.
    """
    prior = np.log([getattr(Constants(), name) for name in names])
    counts = Counter(row.source for row in rows)
    weights = np.array([counts[row.source] ** -0.5 for row in rows])

    def loss(logs: np.ndarray) -> float:
        constants = _with(start, names, logs)
        size = np.abs([log_ratio(at(row, constants)) for row in rows])
        huber = np.where(size < _LARGE, size**2, 2 * _LARGE * size - _LARGE**2)
        return float(weights @ huber + _HOLD * np.sum((logs - prior) ** 2))

    logs = np.log([getattr(start, name) for name in names])
    now, steps = loss(logs), np.full(len(names), 0.1)
    for _ in range(rounds):
        before = now
        for i in range(len(names)):
            for step in (steps[i], -steps[i]):
                tried = _bounded(names, logs + step * np.eye(len(names))[i])
                there = loss(tried)
                if there < now:
                    logs, now = tried, there
                    break
            else:
                steps[i] /= 2
        say(f"  {now:.4f} {_with(start, names, logs)}")
        if before - now < 1e-3 * now and steps.max() < 0.03:
            break
    return _with(start, names, logs)


def _with(start: Constants, names: Sequence[str], logs: np.ndarray) -> Constants:
    return replace(start, **dict(zip(names, np.exp(logs).tolist(), strict=True)))


def _bounded(names: Sequence[str], logs: np.ndarray) -> np.ndarray:
    """Shares are at most 1; a copy is known to reach more than 0.6 of the bandwidth."""
    low = [math.log(0.6) if name == "memory" else -math.inf for name in names]
    high = [0.0 if name in _SHARES else math.inf for name in names]
    return np.clip(logs, low, high)


def _usable(constants: Constants, rows: Sequence[Row]) -> Constants:
    """The share of memory at which runs begin to fail: where the lower of precision and recall is highest."""

    def score(share: float) -> float:
        precision, recall = failures(at(row, replace(constants, usable=share)) for row in rows)
        return min(precision or 0, recall or 0)

    best = max(np.arange(0.7, 1.06, 0.01).tolist(), key=score)
    return replace(constants, usable=float(best))


def sensitivity(rows: Sequence[Row], by: float = 1.1) -> dict[str, float]:
    """By constant: the mean |change| of the predicted time in per cent where it is `by` times as large."""
    before = np.array([step_time(row.job).seconds for row in rows])
    found = {}
    for name in TIME_CONSTANTS:
        after = np.array([step_time(_scaled(row, name, by).job).seconds for row in rows])
        found[name] = 100 * float(np.mean(np.abs(after / before - 1)))
    return found


def _scaled(row: Row, name: str, by: float) -> Row:
    constants = row.job.machine.constants
    return at(row, replace(constants, **{name: getattr(constants, name) * by}))
