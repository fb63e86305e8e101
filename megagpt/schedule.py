"""What changes over a run, as pure functions of the step: batch size, sequence length, learning rate.

Steps count from 0 here, as in the engine. Nothing depends on the layout, so that resuming takes one integer on any of
them. A run falls into phases of one batch size and one sequence length; within a phase everything is a multiplication.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from megagpt.config import OptimConfig, RunConfig


@dataclass(frozen=True)
class Phase:
    """The steps from `first_step` on that are alike. samples, tokens: trained on before the first of them."""

    first_step: int
    batch_size: int
    seq_len: int
    samples: int
    tokens: int


class Schedule:
    """The course of one run; built once, then asked."""

    def __init__(self, config: RunConfig) -> None:
        self.train_steps = config.train.train_steps
        self.phases = tuple(_phases(config))
        self._first_steps = [phase.first_step for phase in self.phases]
        self._overfits = config.debug.overfit_one_batch
        self._rate = _Rate(config.optim, self)

    def batch_size(self, step: int) -> int:
        """Sequences of a step, over all processes.

        Source: Brown et al. 2020, section 2.3 and appendix B (linear in tokens); Chowdhery et al. 2022 (PaLM), section
        5 (by step).
        """
        return self._phase(step).batch_size

    def seq_len(self, step: int) -> int:
        """Tokens of each sequence of a step; of a longer sample the first ones count, and the others are left out.

        Source: Li et al. 2021 (sequence length warm-up), section 4; the linear pacing.
        """
        return self._phase(step).seq_len

    def samples_before(self, step: int) -> int:
        """Sequences that the steps before this one read."""
        phase = self._phase(step)
        return phase.samples + (step - phase.first_step) * phase.batch_size

    def tokens_before(self, step: int) -> int:
        """Tokens that the steps before this one trained on."""
        phase = self._phase(step)
        return phase.tokens + (step - phase.first_step) * phase.batch_size * phase.seq_len

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run."""
        return self.tokens_before(self.train_steps)

    def positions(self, step: int) -> range:
        """The positions, in the order of the training samples, of those that a step reads."""
        first = 0 if self._overfits else self.samples_before(step)
        return range(first, first + self.batch_size(step))

    def first_step_after(self, tokens: int) -> int:
        """The first step before which that many tokens, or more, were trained on."""
        phase = self.phases[bisect_right(self.phases, tokens, key=lambda p: p.tokens) - 1]
        return phase.first_step + _ceil_div(tokens - phase.tokens, phase.batch_size * phase.seq_len)

    def learning_rate(self, step: int) -> float:
        """The rate of a step: linear warm-up, hold, and the decay that optim.schedule names.

        Source: Loshchilov & Hutter 2017 (cosine); Radford et al. 2018 (with warm-up); Brown et al. 2020, appendix B
        (in tokens); Raffel et al. 2020, section 3.1.2 and Chowdhery et al. 2022, section 5 (inverse square root);
        Hu et al. 2024 (warm-up, stable, decay), Hägele et al. 2024 (its decay by a line).
        """
        return self._rate(step)

    def remarks(self) -> list[str]:
        """What of the learning rate's course will not come to pass, in words."""
        return self._rate.remarks()

    def _phase(self, step: int) -> Phase:
        return self.phases[bisect_right(self._first_steps, step) - 1]


class _Rate:
    """The learning rate. Its decay is measured on one clock, of steps or of tokens (`_time`)."""

    def __init__(self, optim: OptimConfig, schedule: Schedule) -> None:
        self._optim, self._schedule = optim, schedule
        warm = optim.warmup_steps if optim.warmup_tokens is None else schedule.first_step_after(optim.warmup_tokens)
        self._warm_steps, self._decay_step = warm, warm + optim.hold_steps
        self._end = optim.decay_tokens or optim.decay_steps or schedule.train_steps
        self._begin: float = self._time(self._decay_step)
        if optim.schedule == "wsd":
            self._begin = max(self._begin, self._end * (1 - optim.decay_fraction))

    def __call__(self, step: int) -> float:
        optim = self._optim
        done, whole = step + 1, optim.warmup_steps
        if optim.warmup_tokens is not None:
            done, whole = self._schedule.tokens_before(step + 1), optim.warmup_tokens
        if done <= whole:
            return optim.warmup_from + (optim.lr - optim.warmup_from) * done / whole
        floor = optim.lr * optim.min_lr_fraction
        match optim.schedule:
            case "constant":
                return optim.lr
            case "inverse_sqrt":
                return max(floor, optim.lr * math.sqrt(self._decay_step / max(step, self._decay_step)))
            case "cosine":
                return floor + (optim.lr - floor) * 0.5 * (1.0 + math.cos(math.pi * self._progress(step)))
            case "linear" | "wsd":
                return floor + (optim.lr - floor) * (1.0 - self._progress(step))

    def remarks(self) -> list[str]:
        optim, n_steps = self._optim, self._schedule.train_steps
        if self._warm_steps > n_steps:
            return [
                f"the warm-up takes {self._warm_steps:,} steps and the run has {n_steps:,}: the learning rate gets "
                f"to {self(n_steps - 1):.3g}, not to {optim.lr:.3g}"
            ]
        first = self._decay_step
        if optim.schedule in ("cosine", "linear", "wsd") and self._end <= self._time(first) and 0 < first < n_steps - 1:
            unit = "tokens" if optim.decay_tokens is not None else "steps"
            rates = f"{self(first):.3g} to {self(first + 1):.3g}"
            return [
                f"the decay ends at {self._end:,} {unit}, which is before the warm-up (with what it holds) does, at "
                f"step {first:,}: the learning rate falls from {rates} at once"
            ]
        return []

    def _progress(self, step: int) -> float:
        """The share of the decay that lies behind: 0 at its beginning, and 1 from its end on."""
        return min(1.0, max(0.0, (self._time(step) - self._begin) / max(1, self._end - self._begin)))

    def _time(self, step: int) -> int:
        return self._schedule.tokens_before(step) if self._optim.decay_tokens is not None else step


def _phases(config: RunConfig) -> Iterator[Phase]:
    """From one change to the next: the time that this takes does not depend on the number of steps."""
    batches, lengths = _batch_source(config), _Lengths(config)
    step = samples = tokens = 0
    while True:
        phase = Phase(step, batches.size(step, tokens), lengths.at(step), samples, tokens)
        yield phase
        batch_tokens = phase.batch_size * phase.seq_len
        changes = [batches.next_change(step, tokens, batch_tokens), lengths.next_change(step)]
        following = [change for change in changes if change is not None]
        if not following:
            return
        n_steps = min(following) - step
        step, samples, tokens = step + n_steps, samples + n_steps * phase.batch_size, tokens + n_steps * batch_tokens


def _batch_source(config: RunConfig) -> _ByStep | _Ramp:
    return _ByStep(config) if config.train.batch_ramp_tokens is None else _Ramp(config)


class _ByStep:
    """Batch sizes that the configuration lists by step; or the one that it has."""

    def __init__(self, config: RunConfig) -> None:
        train = config.train
        self._sizes = dict(train.batch_steps) or {1: train.global_batch_size}

    def size(self, step: int, _tokens: int) -> int:
        return self._sizes[max(first for first in self._sizes if first <= step + 1)]

    def next_change(self, step: int, _tokens: int, _batch_tokens: int) -> int | None:
        return min((first - 1 for first in self._sizes if first - 1 > step), default=None)


class _Ramp:
    """A batch that grows by equal increments, at equal distances in tokens."""

    def __init__(self, config: RunConfig) -> None:
        train = config.train
        assert train.batch_ramp_start is not None and train.batch_ramp_tokens is not None  # the caller has looked
        self._start, self._tokens = train.batch_ramp_start, train.batch_ramp_tokens
        self._increment = train.batch_ramp_increment or train.batch_ramp_start
        self._n_increments = (train.global_batch_size - self._start) // self._increment

    def size(self, _step: int, tokens: int) -> int:
        return self._start + self._increment * self._level(tokens)

    def next_change(self, step: int, tokens: int, batch_tokens: int) -> int | None:
        level = self._level(tokens) + 1
        if level > self._n_increments:
            return None
        return step + _ceil_div(_ceil_div(level * self._tokens, self._n_increments) - tokens, batch_tokens)

    def _level(self, tokens: int) -> int:
        return min(self._n_increments, tokens * self._n_increments // self._tokens)


class _Lengths:
    """Sequence lengths that grow by equal increments from seq_len_start, at seq_len_warmup_steps the whole one."""

    def __init__(self, config: RunConfig) -> None:
        train = config.train
        self._whole = config.model.seq_len
        self._start = train.seq_len_start or self._whole
        self._steps, self._increment = train.seq_len_warmup_steps or 0, train.seq_len_increment

    def at(self, step: int) -> int:
        if step >= self._steps:
            return self._whole
        grown = (self._whole - self._start) * step // (self._steps * self._increment) * self._increment
        return self._start + grown

    def next_change(self, step: int) -> int | None:
        if step >= self._steps:
            return None
        level = (self.at(step) - self._start) // self._increment + 1
        return min(self._steps, _ceil_div(level * self._increment * self._steps, max(1, self._whole - self._start)))


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
