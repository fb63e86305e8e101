"""A run begins with the same weights in every layout, made as shards; and one that goes on draws nothing."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megagpt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megagpt.inventory.parameter import AVERAGE, WEIGHT
from megagpt.model.gpt import GPT
from megagpt.parallel import beginning
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.mesh import build_mesh
from megagpt.parallel.parameter import part_of
from megagpt.plan.plan import make_plan
from megagpt.processes.local import run_ranks
from megagpt.processes.start import quiet
from megagpt.train.step.engine import Engine
from tests.live_bytes import LiveBytes
from tests.parity.rank import LocalPart, pieces_of, start_engine
from tests.parity.walk import Layout, merge, parity_config, spread_out

# Everything that is cut in its own way: fewer key heads than ranks, a gate, an odd vocabulary, its bias, an own head.
MODEL = ModelConfig(
    n_layers=2, d_model=24, n_heads=4, n_kv_heads=2, seq_len=16, vocab_size=211, activation="swiglu", d_ff=36,
    tied_embeddings=False, bias_head=True,
)  # fmt: skip
MONARCH = dataclasses.replace(MODEL, mlp="monarch", mlp_blocks=4, tied_embeddings=True, n_kv_heads=None)
BUTTERFLY = dataclasses.replace(MODEL, mlp="butterfly")
LAYOUTS = [
    (Layout(tp=4, micro_batch_size=1), MODEL, "fp32"),
    (Layout(tp=2, pp=2, micro_batch_size=1), MONARCH, "fp32"),
    (Layout(dp=3, zero_stage=1, micro_batch_size=1), MODEL, "bf16"),
    (Layout(tp=2, dp=2, zero_stage=2, micro_batch_size=1), MONARCH, "bf16"),
    (Layout(dp=3, zero_stage=3, micro_batch_size=1), BUTTERFLY, "fp32"),
    (Layout(tp=2, dp=2, zero_stage=3, micro_batch_size=1), MODEL, "bf16"),
    (Layout(dp=2, zero_stage=2, offload_optimizer=True, micro_batch_size=1), MODEL, "fp32"),
]


def first_weights(config: RunConfig, dp: int) -> tuple[list[LocalPart], list[LocalPart], int]:
    """This rank's pieces of the masters and of their average, and how many weights that it computes with are others."""
    engine = start_engine(config, dp)
    found = [pieces_of(engine, key) for key in (WEIGHT, AVERAGE)]
    n_other = 0
    for named in engine.parameters:
        segment = engine.masters.segments.of[named.name]
        begins = named.beginning(segment.shape, config.train.seed).elements(0, segment.shape.numel())
        shard = begins[segment.start : segment.start + segment.length]
        for held in engine.backend.local_weights(named):
            wanted = begins if held.numel() == len(begins) else shard
            if held.numel():
                n_other += int((held.reshape(-1)[: len(wanted)] != wanted.to(held.dtype)).sum())
    engine.close()
    return found[0], found[1], n_other


@pytest.mark.parametrize(("layout", "model", "precision"), LAYOUTS, ids=lambda value: str(value)[:40])
def test_every_layout_begins_with_the_same_bits(layout: Layout, model: ModelConfig, precision: str):
    config = spread_out(parity_config(model, precision), layout)  # type: ignore[arg-type]
    train, optim = config.train, config.optim
    config = dataclasses.replace(
        config,
        train=dataclasses.replace(train, global_batch_size=12),
        optim=dataclasses.replace(optim, ema_decay=0.9),
    )
    ranks = run_ranks(first_weights, layout.world_size, config, layout.dp)
    wanted = {n: part_of(p).unpadded(p.detach()) for n, p in GPT(model, SINGLE, config.train.seed).named_parameters()}
    for found in (merge(rank[0] for rank in ranks), merge(rank[1] for rank in ranks)):
        assert found.keys() == wanted.keys()
        for name, values in wanted.items():
            assert torch.equal(found[name], values), name
    assert [rank[2] for rank in ranks] == [0] * layout.world_size


def bytes_of_birth(config: RunConfig) -> tuple[int, int]:
    """The most bytes of tensors at once while a model of ZeRO 3 is made, and of a whole engine while it starts."""
    from megagpt.train.step.deepspeed import zero
    from megagpt.train.step.deepspeed.backend import ModelParallelUnit, _connect
    from megagpt.train.step.deepspeed.settings import deepspeed_settings

    quiet()
    mesh, plan = build_mesh("cpu", pp=1, dp=dist.get_world_size(), tp=1), make_plan(config, dist.get_world_size())
    _connect()
    with LiveBytes() as birth:
        model = GPT(config.model, SINGLE, empty=True)
        zero.shard_at_birth(model, deepspeed_settings(config, plan, on_gpu=False), ModelParallelUnit(mesh))
    with LiveBytes() as start:
        engine = Engine(config, plan, mesh)
    engine.close()
    return birth.peak, start.peak


def test_zero_3_shards_a_model_at_birth(tmp_path: Path):
    """A rank holds its share, and one parameter whole at a time; when it has started, no more than the plan counts."""
    buffers = tmp_path / "small_buffers.json"
    buffers.write_text('{"zero_optimization": {"reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 100}}')
    model = ModelConfig(n_layers=8, d_model=64, n_heads=4, seq_len=16, vocab_size=128, position="none")
    train = TrainConfig(micro_batch_size=1, global_batch_size=4, deepspeed_config=str(buffers))
    config = RunConfig(model=model, parallel=ParallelConfig(zero_stage=3), train=train)
    (stage,) = make_plan(config, 4).stages
    memory = stage.memory
    states = memory.weights + memory.gradients + memory.optimizer
    for birth, start in run_ranks(bytes_of_birth, 4, config):
        assert birth <= memory.start < 2 / 3 * 4 * stage.params_local
        assert start <= 1.05 * max(states, memory.start)


def draws_nothing(config: RunConfig) -> int:
    n_drawn = []
    beginning.fill_normal = lambda *_: n_drawn.append(1)  # in this process alone
    engine = Engine(config, make_plan(config, 1), build_mesh("cpu", pp=1, dp=1, tp=1), begin=False)
    engine.close()
    return len(n_drawn)


def test_a_run_that_loads_draws_nothing():
    assert run_ranks(draws_nothing, 1, parity_config(MODEL)) == [0]
