"""NaN and Inf, planted in one place of one rank: no rank moves, and the run goes on as if the step was left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megagpt.config import RunConfig
from megagpt.processes.local import run_ranks
from megagpt.train.step.engine import StepResult
from tests.parity.rank import batches_of, start_engine
from tests.parity.walk import Layout
from tests.train.plants import BAD, STEPS, Plant, all_of, config_of, planted, same, zero


def run_with(config: RunConfig, dp: int, plant: Plant | None) -> tuple[bool, list[StepResult], Any, list[Tensor]]:
    """Train with one bad step, or with that step left out: did the bad one leave all as it was; and the outcome."""
    engine = start_engine(config, dp)
    results, untouched = [], True
    for step in range(STEPS):
        batches = batches_of(config, step, engine.mesh.data)
        if step != BAD:
            results.append(engine.train_step(step, batches))
            continue
        before = all_of(engine)
        if plant is None:
            results.append(engine.skip_step(step))
        else:
            with planted(engine, plant):
                results.append(engine.train_step(step, batches))
        untouched = same(before, all_of(engine))
    outcome = engine.counters, all_of(engine)
    engine.close()
    return untouched, results, *outcome


def both_runs(config: RunConfig, dp: int, plants: list[Plant]) -> list[tuple]:
    return [run_with(config, dp, plant) for plant in (None, *plants)]


def case(layout: Layout, precision: str, *plants: Plant) -> Any:
    return pytest.param(layout, precision, plants, id=f"{layout} {precision}".replace("=", ""))


TP2, DP2, TP2_DP2 = (
    Layout(tp=2, micro_batch_size=2),
    Layout(dp=2, micro_batch_size=2),
    Layout(tp=2, dp=2, micro_batch_size=2),
)
PP2, TP2_PP2 = Layout(pp=2, micro_batch_size=2), Layout(tp=2, pp=2, micro_batch_size=2)


def weight(rank: int) -> Plant:
    return Plant("gradient", "blocks.2.mlp.up.weight", rank)


def norm(rank: int) -> Plant:
    """Of a weight that all ranks of the model axis have: above rank 0 no norm counts it."""
    return Plant("gradient", "blocks.2.norm_1.weight", rank)


def loss(rank: int) -> Plant:
    return Plant("loss", "", rank, torch.inf)


@pytest.mark.parametrize(
    ("layout", "precision", "plants"),
    [
        case(Layout(micro_batch_size=2), "fp32", weight(0), loss(0)),
        case(TP2, "fp32", weight(1), norm(1), Plant("activation", "blocks.1/mlp.up", 1, -torch.inf)),
        case(PP2, "fp32", Plant("activation", "blocks.0/norm_1", 0), loss(1)),
        case(DP2, "fp32", weight(1), loss(0)),
        case(zero(1, DP2), "fp32", weight(1)),
        case(zero(2, TP2_DP2), "fp32", weight(3), norm(3), norm(1)),
        case(zero(2, DP2), "bf16", loss(0)),
        case(zero(3, TP2_DP2), "fp32", weight(3), norm(3), norm(1)),
        case(zero(3, DP2), "bf16", weight(1)),
        case(TP2_PP2, "fp32", norm(3), Plant("gradient", "embedding.tokens.weight", 1)),
        case(zero(1, TP2_PP2), "bf16", norm(3), weight(3), Plant("gradient", "embedding.tokens.weight", 2), loss(3)),
    ],
)
def test_a_bad_step_is_as_one_left_out(layout, precision, plants):
    ranks = run_ranks(both_runs, layout.world_size, config_of(layout, precision), layout.dp, plants)
    for (kept, _, counters, tensors), *runs in ranks:
        assert kept and counters["skipped_steps"] == 1
        for plant, (untouched, results, their_counters, their_tensors), of_rank_0 in zip(
            plants, runs, ranks[0][1:], strict=True
        ):
            assert [r.skipped for r in results] == [step == BAD for step in range(STEPS)], plant
            assert untouched and their_counters == counters and same(tensors, their_tensors), plant
            trained = [(r.grad_norm, r.loss) for r in results if not r.skipped]
            assert trained == [(r.grad_norm, r.loss) for r in of_rank_0[1] if not r.skipped]  # what ranks decide by
