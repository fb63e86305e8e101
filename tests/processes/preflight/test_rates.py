"""Rates of a machine: the line that a product's depth makes is found again, and times are of work that was done."""

from __future__ import annotations

import pytest
import torch

from megagpt.processes.preflight.rates import copy_rate, half_depth, matrix_rates, timed


def test_the_best_rate_and_the_depth_of_half_of_it_are_found():
    made = {k: 300e12 * k / (k + 150) for k in (64, 256, 1024, 4096)}
    assert half_depth(made) == (pytest.approx(300e12), pytest.approx(150))


def test_rates_are_of_every_depth_and_positive():
    rates = matrix_rates(torch.device("cpu"), torch.float32, 32, seconds=0.0)
    assert len(rates) == 4 and all(rate > 0 for rate in rates.values())
    assert copy_rate(torch.device("cpu"), 2**16, seconds=0.0) > 0


def test_a_call_is_timed_as_often_as_was_asked():
    calls = []
    assert timed(lambda: calls.append(1), torch.device("cpu"), 0.0, burst=5, least=4) >= 0
    assert len(calls) == 1 + 4 * 5
