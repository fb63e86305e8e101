"""AdEMAMix: its paper in plain float64, the same on every layout, kept in checkpoints, and known to the plan."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megagpt.checkpoint import folders
from megagpt.config import OptimConfig
from megagpt.errors import UserError
from megagpt.optim.ademamix import SLOW, SLOW_BETA, SLOW_WEIGHT
from megagpt.plan.plan import make_plan
from megagpt.processes.local import run_ranks
from tests.optim.test_optimizer_layouts import MODEL, differing, train_and_save
from tests.optim.test_optimizers import RATES, gradient_of, parameters_of, train
from tests.parity.walk import REFERENCE, Layout, compare, parity_config, run_layout, spread_out

OPTIM = OptimConfig(optimizer="ademamix", lr=5e-3, warmup_steps=2, clip=0.3, eps=1e-6)


def plain(named, n_total: int) -> list[dict[str, torch.Tensor]]:
    """Algorithm 1 in float64. The half-life of beta3 is log(1/2) / log(beta3): linear in the step."""
    weights = {n.name: n.part.unpadded(n.parameter.detach()).double() for n in named}
    fast, slow, square = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(3))
    half_life = lambda beta: math.log(0.5) / math.log(beta)  # noqa: E731
    found = []
    for step, rate in enumerate(RATES, start=1):
        share = step / n_total
        beta3 = 0.5 ** (1 / ((1 - share) * half_life(0.9) + share * half_life(SLOW_BETA)))
        for n in named:
            g = gradient_of(n, step - 1).double()
            for average, beta, value in ((fast, 0.9, g), (slow, beta3, g), (square, 0.95, g**2)):
                average[n.name] = beta * average[n.name] + (1 - beta) * value
            root = (square[n.name] / (1 - 0.95**step)).sqrt() + 1e-8
            direction = (fast[n.name] / (1 - 0.9**step) + share * SLOW_WEIGHT * slow[n.name]) / root
            decay = 0.1 if n.declared.decays else 0.0
            weights[n.name] = weights[n.name] - rate * (direction + decay * weights[n.name])
        found.append(dict(weights))
    return found


def test_it_is_the_paper_s():
    named = parameters_of()
    expected = plain(named, n_total=500)
    for ours, theirs in zip(train(named, OptimConfig(optimizer="ademamix")), expected, strict=True):
        for name, weight in ours.items():
            assert (weight.double() - theirs[name]).abs().max() < 1e-6, name


def config_of():
    config = parity_config(MODEL)
    return dataclasses.replace(config, optim=OPTIM, train=dataclasses.replace(config.train, train_steps=8))


LAYOUTS = [Layout(tp=2, pp=2, zero_stage=1, micro_batch_size=2), Layout(dp=2, zero_stage=3, micro_batch_size=2)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_it_steps_alike_on_every_layout(layout):
    difference = compare(run_layout(config_of(), layout), run_layout(config_of(), REFERENCE), config_of())
    assert difference.ok, difference


def test_a_checkpoint_keeps_the_slow_average(tmp_path):
    here, there = (spread_out(config_of(), layout) for layout in LAYOUTS)
    losses = run_ranks(train_and_save, 4, here, 1, tmp_path / "a")[0]
    assert run_ranks(train_and_save, 2, there, 2, tmp_path / "b", tmp_path / "a")[0] == pytest.approx(losses, rel=3e-6)
    assert differing(tmp_path / "a@4", tmp_path / "b@4") == []
    assert any(f.name.startswith(SLOW) for f in folders.find(tmp_path / "a").iterdir())


def test_the_plan_counts_three_moments():
    def optimizer_bytes(name: str) -> int:
        config = dataclasses.replace(config_of(), optim=OptimConfig(optimizer=name))
        return make_plan(config, 1).stages[0].memory.optimizer

    assert optimizer_bytes("ademamix") * 2 == optimizer_bytes("adamw") * 3


def test_a_fast_average_slower_than_the_slow_one_is_refused():
    with pytest.raises(UserError, match=r"optim\.beta1=0\.99995 .* must lie between 0 and the slow average's 0\.9999"):
        OptimConfig(optimizer="ademamix", beta1=0.99995)
