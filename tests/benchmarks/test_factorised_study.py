"""benchmarks/factorised_study.py: equal compute, the same text, and what the compute multiplier says."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.factorised_study import BATCH, SEQ_LEN, Run, compute_for, curves, model_of, multipliers, plot, trained
from megagpt.errors import UserError


def run(kind: str, budget: float, loss: float, d_model: int = 64) -> Run:
    return Run(kind, d_model, 1e-3, budget, 1000, 100, 10, loss, 1.0)


def test_the_multiplier_is_the_compute_of_dense_at_equal_loss():
    """On a power law L = C^-0.1 a model that is twice as good as its compute has the multiplier 2, exactly."""
    budgets = (1e10, 4e10, 16e10)
    runs = [run("dense", c, c**-0.1) for c in budgets] + [run("butterfly", c, (2 * c) ** -0.1) for c in budgets]
    found = multipliers(curves(runs))
    assert [(m.kind, m.budget_flops, m.bound) for m in found] == [
        ("butterfly", 1e10, ""), ("butterfly", 4e10, ""), ("butterfly", 16e10, ">"),
    ]  # fmt: skip
    assert [m.value for m in found] == pytest.approx([2.0, 2.0, 1.0])  # the last one: at least that


def test_a_loss_that_dense_never_had_gives_a_bound():
    curve = [(1e10, 3.0), (4e10, 2.0)]
    assert compute_for(4.0, curve) == (1e10, "<")
    assert compute_for(1.0, curve) == (4e10, ">")
    assert compute_for(3.0, curve) == (1e10, "")


def test_the_best_width_and_rate_count():
    best = curves([run("dense", 1e10, 3.0), run("dense", 1e10, 2.0, 128), run("dense", 4e10, 1.0)])
    assert [(r.budget_flops, r.d_model) for r in best["dense"]] == [(1e10, 128), (4e10, 64)]


def test_runs_of_a_budget_take_the_same_compute_and_learn(tmp_path):
    text = np.tile(np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", np.uint8), 400)
    runs = [trained(kind, model_of(kind, 32, 1), 4e9, 1e-2, text) for kind in ("dense", "butterfly", "monarch:4")]
    for one in runs:
        assert one.steps * one.flops_per_token * BATCH * SEQ_LEN == pytest.approx(4e9, rel=0.05)
        assert one.loss < 4  # of 256 letters: 5.5 at first
    assert runs[1].steps > runs[0].steps  # cheaper, so it reads more
    plot(curves(runs), runs, tmp_path / "study.png")
    assert (tmp_path / "study.png").stat().st_size > 5000


@pytest.mark.parametrize("kind", ["dens", "monarch", "butterfly:3", "low_rank:x"])
def test_a_kind_that_is_none_is_refused(kind):
    with pytest.raises(UserError, match=f"--kinds {kind}: wanted dense, low_rank:N"):
        model_of(kind, 64, 1)
