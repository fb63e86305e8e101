"""When is a step a spike? On made-up curves, where it is known."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from megagpt.config import FaultConfig
from megagpt.train.faults.spikes import WINDOW, History, judge

THRESHOLD = FaultConfig().spike_zscore
N_STEPS = 10_000


def curve(seed: int, noise: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient norm of a run: a power law from 11 nats, and a norm that rises in warm-up and then falls.

    The noise is normal, of the norm's logarithm with a tail: one step in 50 has three times as much.
    """
    random, step = np.random.default_rng(seed), np.arange(N_STEPS)
    losses = 2 + 9 * (1 + step / 20) ** -0.5 + noise * random.standard_normal(N_STEPS)
    tail = np.where(random.random(N_STEPS) < 0.02, 3.0, 1.0)
    log_norms = np.log(0.3 + 3 * np.minimum(step / 100, 1) * np.exp(-step / 500)) + 0.2 * tail * random.standard_normal(
        N_STEPS
    )
    return losses, np.exp(log_norms)


EMPTY = History()


def spikes_of(losses, norms, history: History = EMPTY, threshold: float = THRESHOLD):
    found = []
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        history, spike = judge(history, float(loss), float(norm), threshold)
        if spike:
            found.append((step, spike.what))
    return found, history


@pytest.mark.parametrize("noise", [0.0, 0.002, 0.05, 0.3])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_falling_noisy_loss_has_none(seed, noise):
    assert spikes_of(*curve(seed, noise))[0] == []


@pytest.mark.parametrize("step", [500, 1000, N_STEPS - 1])
def test_a_jump_is_found(step):
    losses, norms = curve(0)
    losses[step] += 2
    assert spikes_of(losses, norms)[0] == [(step, "loss")]
    losses, norms = curve(0)
    norms[step] *= 100
    assert spikes_of(losses, norms)[0] == [(step, "gradient norm")]
    assert spikes_of(losses, norms, threshold=0)[0] == []


def test_a_loss_that_stays_is_one_spike_and_then_the_new_normal():
    losses, norms = curve(0)
    losses[2000:] += 2
    assert spikes_of(losses, norms)[0] == [(2000, "loss")]
    losses[3000] += 2
    assert spikes_of(losses, norms)[0] == [(2000, "loss"), (3000, "loss")]


def test_a_drop_is_none():
    losses, norms = curve(0)
    losses[2000:] -= 1
    norms[2000:] /= 100
    assert spikes_of(losses, norms)[0] == []


def test_a_curve_without_noise_has_no_tiny_spikes():
    losses, norms = np.full(200, 1e-3), np.full(200, 0.5)
    losses[150], norms[170] = 0.05, 0.8
    assert spikes_of(losses, norms)[0] == []
    norms[180] = 5.0
    assert spikes_of(losses, norms)[0] == [(180, "gradient norm")]


def test_a_trend_is_not_far_from_its_window():
    """The claim on top of the file: 1.4 deviations, whatever the slope."""
    for slope in (-3.0, 0.1, 3.0):
        window = [slope * i for i in range(WINDOW)]
        _, spike = judge(History(tuple(window), (0.0,) * WINDOW), slope * WINDOW, 1.0, 1.4)
        assert spike is None
    _, spike = judge(History(tuple(window), (0.0,) * WINDOW), slope * WINDOW, 1.0, 1.3)
    assert spike and spike.zscore == pytest.approx(1.36, abs=0.03)


def test_a_history_from_a_checkpoint_judges_the_same():
    losses, norms = (values[:1200] for values in curve(3))
    losses[1000:1003] += 3
    whole = spikes_of(losses, norms)
    assert whole[0] == [(1000, "loss")]
    for cut in (40, 1001, 1002):
        _, history = spikes_of(losses[:cut], norms[:cut])
        restored = History.from_json(json.loads(json.dumps(history.to_json())))
        assert restored == history and len(restored.losses) <= WINDOW
        found, last = spikes_of(losses[cut:], norms[cut:], restored)
        assert last == whole[1] and found == [(step - cut, what) for step, what in whole[0] if step >= cut]
    assert History.from_json({}) == EMPTY


def test_zero_gradients_are_judged():
    history, spike = judge(History((1.0,) * 100, (0.0,) * 100), 1.0, 0.0, THRESHOLD)
    assert spike is None and math.isfinite(history.log_norms[-1])
