"""NaN and Inf, planted in one place of one rank: no rank moves, and the run goes on as if the step was left out."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megagpt.checkpoint.pieces import MOMENTS, WEIGHT
from megagpt.config import ModelConfig, RunConfig
from megagpt.engine.engine import Engine, StepResult
from megagpt.engine.masters import read, read_counters
from megagpt.engine.stages import GPTStage
from megagpt.model.gpt import Head
from megagpt.parallel.local import run_ranks
from megagpt.parity import Layout, parity_config, spread_out
from megagpt.parity_rank import batches_of, start_engine

MODEL = ModelConfig(n_layers=4, d_model=32, n_heads=4, seq_len=16, vocab_size=211, dropout_residual=0.1)
BAD = 2  # the step that is planted in, counted from 0
STEPS = 5


def config_of(layout: Layout, precision: str = "fp32") -> RunConfig:
    config = spread_out(parity_config(MODEL), layout)
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, warmup_steps=2),
        train=dataclasses.replace(config.train, train_steps=STEPS, precision=precision),
    )


@dataclasses.dataclass(frozen=True)
class Plant:
    """What goes wrong, on which rank, in which of its micro-batches of the step."""

    what: str  # gradient | activation | loss
    where: str  # a parameter or a module
    rank: int
    value: float = torch.nan
    micro_batch: int = 1


@contextlib.contextmanager
def planted(engine: Engine, plant: Plant) -> Iterator[None]:
    """The plant, in place for as long as the block lasts; on the other ranks nothing."""
    if engine.mesh.rank != plant.rank:
        yield
        return
    calls = []

    def spoil(value: Tensor) -> Tensor:
        calls.append(value)
        if len(calls) != plant.micro_batch + 1:
            return value
        spoilt = value.clone()
        spoilt.view(-1)[3 % value.numel()] = plant.value
        return spoilt

    if plant.what == "loss":
        head = layers_of(engine)["head"]
        assert isinstance(head, Head)
        right = head.loss
        head.loss = lambda logits, labels: right(logits, labels) + spoil(torch.zeros(()))  # its gradient is as it was
        yield
        head.loss = right
    elif plant.what == "gradient":
        (parameter,) = (n.parameter for n in engine.parameters if n.name == plant.where)
        handle = parameter.register_hook(spoil)
        yield
        handle.remove()
    else:
        layer, _, name = plant.where.partition("/")
        handle = layers_of(engine)[layer].get_submodule(name).register_forward_hook(lambda m, i, o: spoil(o))
        yield
        handle.remove()
    assert len(calls) > plant.micro_batch, "the plant was never reached"


def layers_of(engine: Engine) -> dict[str, nn.Module]:
    if isinstance(engine.module, GPTStage):
        return dict(engine.module.canonical_layers())
    model: Any = engine.module
    blocks = {f"blocks.{i}": block for i, block in enumerate(model.blocks)}
    return {"embedding": model.embedding, **blocks, "head": model.head}


def all_of(engine: Engine) -> list[Tensor]:
    """Everything that a step may change, of this rank: weights, moments, Adam's count, and what it computes with."""
    held = [read(engine, named, key).clone() for key in (WEIGHT, *MOMENTS) for named in engine.parameters]
    held += [getattr(n.parameter, "ds_tensor", n.parameter).detach().clone() for n in engine.parameters]
    return held + [state["step"].clone() for state in engine.base_optimizer.state.values()]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


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
    outcome = read_counters(engine), all_of(engine)
    engine.close()
    return untouched, results, *outcome


def both_runs(config: RunConfig, dp: int, plants: list[Plant]) -> list[tuple]:
    return [run_with(config, dp, plant) for plant in (None, *plants)]


TP2, PP2, DP2 = Layout(tp=2), Layout(pp=2, micro_batch_size=2), Layout(dp=2, zero_stage=1, micro_batch_size=2)
CASES: list[tuple[Layout, str, list[Plant]]] = []


def case(layout: Layout, precision: str, *plants: Plant) -> Any:
    return pytest.param(layout, precision, plants, id=f"{layout}-{precision}")


UP, NORM = "blocks.2.mlp.up.weight", "blocks.2.norm_1.weight"


@pytest.mark.parametrize(
    ("layout", "precision", "plants"),
    [
        case(Layout(micro_batch_size=2), "fp32", Plant("gradient", UP, 0), Plant("loss", "", 0, torch.inf)),
        case(
            Layout(tp=2, micro_batch_size=2),
            "fp32",
            Plant("gradient", UP, 1),
            Plant("gradient", NORM, 1),
            Plant("activation", "blocks.1/mlp.up", 1, -torch.inf),
        ),
        case(
            Layout(tp=2, zero_stage=1, micro_batch_size=2),
            "fp32",
            Plant("gradient", UP, 1),
            Plant("gradient", NORM, 1),
            Plant("loss", "", 1, torch.inf),
        ),
        case(
            Layout(tp=2, zero_stage=1, micro_batch_size=2),
            "bf16",
            Plant("gradient", UP, 1),
            Plant("gradient", NORM, 1),
            Plant("loss", "", 1, torch.inf),
        ),
        case(
            Layout(tp=2, dp=2, zero_stage=2, micro_batch_size=2),
            "fp32",
            Plant("gradient", UP, 3),
            Plant("gradient", NORM, 3),
            Plant("gradient", NORM, 1),
            Plant("loss", "", 2, torch.inf),
        ),
        case(
            Layout(tp=2, dp=2, zero_stage=3, micro_batch_size=2),
            "fp32",
            Plant("gradient", UP, 3),
            Plant("gradient", NORM, 3),
            Plant("gradient", NORM, 1),
            Plant("loss", "", 2, torch.inf),
        ),
        case(
            Layout(tp=2, dp=2, zero_stage=3, micro_batch_size=2),
            "bf16",
            Plant("gradient", UP, 3),
            Plant("gradient", NORM, 3),
            Plant("loss", "", 2, torch.inf),
        ),
        case(
            Layout(pp=2, micro_batch_size=2),
            "fp32",
            Plant("gradient", UP, 1),
            Plant("activation", "blocks.0/norm_1", 0),
            Plant("loss", "", 1, torch.inf),
        ),
        case(
            Layout(pp=2, zero_stage=1, micro_batch_size=2),
            "bf16",
            Plant("gradient", UP, 1),
            Plant("activation", "blocks.0/norm_1", 0),
            Plant("loss", "", 1, torch.inf),
        ),
        case(Layout(dp=2, micro_batch_size=2), "fp32", Plant("gradient", UP, 1), Plant("loss", "", 1, torch.inf)),
        case(
            Layout(dp=2, zero_stage=1, micro_batch_size=2),
            "bf16",
            Plant("gradient", UP, 1),
            Plant("loss", "", 1, torch.inf),
        ),
        case(
            Layout(dp=2, zero_stage=2, micro_batch_size=2),
            "bf16",
            Plant("gradient", UP, 1),
            Plant("loss", "", 1, torch.inf),
        ),
        case(
            Layout(tp=2, pp=2, micro_batch_size=2),
            "fp32",
            Plant("gradient", UP, 3),
            Plant("gradient", NORM, 3),
            Plant("loss", "", 3, torch.inf),
        ),
        case(
            Layout(tp=2, pp=2, zero_stage=1, micro_batch_size=2),
            "bf16",
            Plant("gradient", UP, 3),
            Plant("gradient", NORM, 3),
            Plant("gradient", "embedding.tokens.weight", 2),
            Plant("loss", "", 3, torch.inf),
        ),
    ],
)
def test_a_bad_step_is_as_one_left_out(layout, precision, plants):
    ranks = run_ranks(both_runs, layout.world_size, config_of(layout, precision), layout.dp, plants)
    for rank, ((kept, _, counters, tensors), *runs) in enumerate(ranks):
        assert kept
        for plant, (untouched, results, their_counters, their_tensors) in zip(plants, runs, strict=True):
            assert [r.skipped for r in results] == [step == BAD for step in range(STEPS)], (rank, plant, results)
            assert untouched, (rank, plant)
            assert their_counters == counters and counters["skipped_steps"] == 1
            assert same(tensors, their_tensors), (rank, plant)
            assert [(r.grad_norm, r.loss) for r in results if not r.skipped] == [
                (r.grad_norm, r.loss) for r in ranks[0][1][1] if not r.skipped
            ]
