"""A fine-tuning is one run on any layout: losses, norms, weights, answers; with dropout, clipping and layer decay."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagpt.config import FinetuneConfig, ModelConfig, RunConfig
from megagpt.data.loader import micro_batches
from megagpt.finetune.glue import Glue
from megagpt.finetune.packing import first_rows
from megagpt.finetune.rows import PackedRows
from megagpt.inventory.parameter import WEIGHT
from megagpt.model.gpt import Head
from megagpt.processes.local import run_ranks
from megagpt.schedule import Schedule
from tests.finetune.examples import READING, write_glue
from tests.parity.rank import pieces_of, start_engine
from tests.parity.walk import Layout, merge, parity_config, spread_out

pytestmark = pytest.mark.timeout(300)  # the first ranks wait for a fork server, on a busy machine for minutes
STEPS = 4
MODEL = ModelConfig(
    n_layers=3, d_model=32, n_heads=4, seq_len=48, vocab_size=257, n_classes=2,
    dropout_embedding=0.1, dropout_attention=0.1, dropout_residual=0.1,
)  # fmt: skip
FINETUNE = FinetuneConfig(task="MRPC", layer_decay=0.8, frozen=("blocks.0.attention", "head.norm"))


def config_of(layout: Layout, **optim: Any) -> RunConfig:
    config = spread_out(parity_config(MODEL), layout)
    return dataclasses.replace(
        config,
        model=MODEL,
        finetune=FINETUNE,
        optim=dataclasses.replace(config.optim, warmup_steps=2, clip=0.5, **optim),
        train=dataclasses.replace(config.train, train_steps=STEPS),
    )


def fine_tune(config: RunConfig, dp: int, path: Path) -> Any:
    """Losses and norms of a few steps, this rank's weights before and after, and the answers that it saw."""
    engine = start_engine(config, dp)
    read = Glue("MRPC").read(path, READING)
    lengths = np.array([example.n_tokens for example in read.found])
    n_rows = Schedule(config).samples_before(STEPS)
    rows = PackedRows(read, first_rows(lengths, MODEL.seq_len, 1, True, n_rows), MODEL.seq_len, asks=True)
    data, first = engine.mesh.data, pieces_of(engine, WEIGHT)

    def batches(positions: range) -> Any:
        return micro_batches(rows, config, positions, MODEL.seq_len, dp_rank=data.rank, dp_size=data.size)

    steps = [engine.train_step(step, batches(engine.schedule.positions(step))) for step in range(STEPS)]
    seen: dict[int, list[float]] = {}
    head = dict(engine.backend.layers).get("head")
    if isinstance(head, Head):
        head.on_answers = lambda ids, scores: seen.update(zip(ids.tolist(), scores.tolist(), strict=True))
    held = range(config.train.global_batch_size)
    loss = engine.evaluate(batches(held), len(held) // (config.train.micro_batch_size * dp))
    pieces = pieces_of(engine, WEIGHT)
    engine.close()
    return [s.loss for s in steps], [s.grad_norm for s in steps], first, pieces, loss, seen


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_glue(tmp_path_factory.mktemp("glue") / "train.tsv", "MRPC", 40)


@pytest.fixture(scope="module")
def alone(path) -> Any:
    return run_ranks(fine_tune, 1, config_of(Layout(micro_batch_size=8)), 1, path)[0]


LAYOUTS = [
    Layout(tp=2, micro_batch_size=4),
    Layout(pp=2, micro_batch_size=2),
    Layout(dp=2, zero_stage=1, micro_batch_size=2),
    Layout(dp=2, zero_stage=3, micro_batch_size=4),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_changes_nothing(layout, path, alone):
    ranks = run_ranks(fine_tune, layout.world_size, config_of(layout), layout.dp, path)
    losses, norms, _, wanted, validation, answers = alone
    for found in ranks:
        assert found[0] == pytest.approx(losses, rel=2e-6)
        assert found[1] == pytest.approx(norms, rel=1e-5)
        assert found[4] == pytest.approx(validation, rel=2e-6)
    assert min(norms) > 0.5  # clipping was on
    seen = {number: scores for found in ranks for number, scores in found[5].items()}
    assert seen.keys() == answers.keys()
    for number, scores in answers.items():
        assert seen[number] == pytest.approx(scores, abs=2e-5)
    weights = merge([found[3] for found in ranks])
    reach = sum(map(Schedule(config_of(layout)).learning_rate, range(STEPS)))
    for name, value in merge([wanted]).items():
        assert (weights[name] - value).abs().max().item() < 1e-3 * reach, name


def test_what_is_frozen_stays_and_lower_layers_learn_less(alone):
    """Adam's first steps are of the size of the rate, whatever the gradient."""
    _, _, first, last, _, _ = alone
    before, after = merge([first]), merge([last])
    moved = {name: (after[name] - before[name]).abs().max().item() for name in after}
    for name, far in moved.items():
        frozen = name.startswith(("blocks.0.attention.", "head.norm."))
        assert (far == 0.0) == frozen, name
    by_layer = [moved[name] for name in ("blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight", "blocks.2.mlp.up.weight")]
    assert by_layer[0] < by_layer[1] < by_layer[2] < moved["head.classifier.weight"]


@pytest.mark.parametrize("optimizer", ["muon", "adafactor", "lion"])
def test_what_is_frozen_stays_in_every_optimizer(optimizer, path):
    (found,) = run_ranks(fine_tune, 1, config_of(Layout(micro_batch_size=8), optimizer=optimizer), 1, path)
    before, after = merge([found[2]]), merge([found[3]])
    assert torch.equal(before["blocks.0.attention.qkv.weight"], after["blocks.0.attention.qkv.weight"])
    assert not torch.equal(before["blocks.0.mlp.up.weight"], after["blocks.0.mlp.up.weight"])
