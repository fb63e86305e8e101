"""A NaN or Inf in one place of one rank, and what a step may change: for the tests of what is done about it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from megagpt.config import ModelConfig, RunConfig
from megagpt.model.gpt import Head
from megagpt.train.step.engine import Engine
from tests.parity.walk import Layout, parity_config, spread_out

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
    once: bool = False  # not when the step is done again


@contextlib.contextmanager
def planted(engine: Engine, plant: Plant) -> Iterator[None]:
    """The plant, in place for as long as the block lasts; on the other ranks nothing."""
    if engine.mesh.rank != plant.rank:
        yield
        return
    calls = []

    def spoil(value: Any) -> Tensor:
        calls.append(value)
        n_before = len(calls) - 1 if plant.once else (len(calls) - 1) % engine.plan.micro_batches
        if n_before != plant.micro_batch:
            return value
        spoilt = value.clone()
        spoilt.view(-1)[3 % value.numel()] = plant.value
        return spoilt

    if plant.what == "loss":
        head = dict(engine.backend.layers)["head"]
        assert isinstance(head, Head)
        right = head.loss
        # Infinite with a gradient as it was.
        head.loss = lambda *args: right(*args) + spoil(torch.zeros(()))
        yield
        head.loss = right
    elif plant.what == "gradient":
        (parameter,) = (n.parameter for n in engine.parameters if n.name == plant.where)
        handle = parameter.register_hook(spoil)
        yield
        handle.remove()
    else:
        layer, _, name = plant.where.partition("/")
        module = dict(engine.backend.layers)[layer].get_submodule(name)
        handle = module.register_forward_hook(lambda _module, _inputs, output: spoil(output))
        yield
        handle.remove()
    assert len(calls) > plant.micro_batch, "the plant was never reached"


def all_of(engine: Engine) -> list[Tensor]:
    """Everything that a step may change, of this rank: weights, moments, Adam's count, and what it computes with."""
    masters, backend = engine.masters, engine.backend
    held = [masters.read(named, key).clone() for key, named_ones in masters.kept.items() for named in named_ones]
    held += [backend.local_weights(named)[-1].clone() for named in engine.parameters]
    return held + [state["step"].clone() for state in backend.optimizer.state.values()]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def zero(stage: int, layout: Layout) -> Layout:
    return dataclasses.replace(layout, zero_stage=stage)
