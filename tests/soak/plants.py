"""Defects of a resume, planted in the ranks of a restart: what the comparison must find."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import megagpt.train.run
import megagpt.train.text
from megagpt.train.step.engine import Engine
from megagpt.train.step.masters import Masters


def one_step_off() -> None:
    """The run goes on one step before where it stood."""
    load = Engine.load

    def early(*args: Any) -> Any:
        state = load(*args)
        return dataclasses.replace(state, step=state.step - 1)

    Engine.load = early


def dropout_keyed_anew() -> None:
    """Dropout masks are keyed by something that a restart changes."""
    micro_batches = megagpt.train.run.micro_batches

    def shifted(*args: Any, **kwargs: Any) -> Any:
        for batch in micro_batches(*args, **kwargs):
            yield dataclasses.replace(batch, sample_ids_B=batch.sample_ids_B + 1000)

    megagpt.train.run.micro_batches = shifted


def moment_not_restored() -> None:
    """Adam's second moment begins with zeros, but for its count."""
    write = Masters.write

    def most(self: Masters, named: Any, key: str, values: Any) -> None:
        write(self, named, key, values * 0 if key == "exp_avg_sq" else values)

    Masters.write = most


def one_bit_of_one_weight() -> None:
    """The last bit of one weight is another one."""
    write = Masters.write
    left = ["weight"]

    def nearly(self: Masters, named: Any, key: str, values: Any) -> None:
        if key in left:
            left.remove(key)
            values.flatten()[0] *= 1 + 2**-23
        write(self, named, key, values)

    Masters.write = nearly


def other_samples() -> None:
    """The order of the samples is another one, with the same count."""
    build_splits = megagpt.train.text.build_splits

    def another(datasets: Any, weights: Any, split: Any, seq_len: Any, seed: int, counts: Any) -> Any:
        return build_splits(datasets, weights, split, seq_len, seed + 1, counts)

    megagpt.train.text.build_splits = another


PLANTS: dict[str, Callable[[], None]] = {
    plant.__name__: plant
    for plant in (one_step_off, dropout_keyed_anew, moment_not_restored, one_bit_of_one_weight, other_samples)
}
