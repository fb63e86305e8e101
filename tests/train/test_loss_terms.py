"""z-loss and label smoothing: in the gradient on every layout, and in no loss that is shown."""

from __future__ import annotations

import dataclasses

import pytest
import torch.nn.functional as F
from torch import Tensor

from megagpt.config import ModelConfig, RunConfig
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.processes.local import run_ranks
from tests.parity.rank import LocalPart, batches_of, start_engine, train_on_rank
from tests.parity.walk import Layout, merge, parity_config, spread_out

MODEL = ModelConfig(n_layers=2, d_model=32, n_heads=4, seq_len=16, vocab_size=211)
Z_LOSS, SMOOTHING = 3e-2, 0.2


def config_of(layout: Layout) -> RunConfig:
    config = spread_out(parity_config(MODEL), layout)
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, z_loss=Z_LOSS, label_smoothing=SMOOTHING),
        train=dataclasses.replace(config.train, train_steps=1),
    )


def expected() -> tuple[float, dict[str, Tensor]]:
    """torch's own cross-entropy and logsumexp, in float64: the plain loss, and the gradient of the whole one."""
    config = config_of(Layout(micro_batch_size=8))
    model = GPT(MODEL, SINGLE, config.train.seed).double()
    (batch,) = batches_of(config, 0)
    logits_NV = model(batch.tokens_BT, batch.sample_ids_B).flatten(0, 1)[:, :211]
    labels_N = batch.labels_BT.flatten()
    z_NV = logits_NV.logsumexp(-1).square()
    (F.cross_entropy(logits_NV, labels_N, label_smoothing=SMOOTHING) + Z_LOSS * z_NV.mean()).backward()
    plain = F.cross_entropy(logits_NV, labels_N).item()
    return plain, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def train_and_evaluate(config: RunConfig, dp: int) -> tuple[float, float, list[LocalPart]]:
    """The loss of the first step; a validation of the same text before it; and this rank's gradients."""
    engine = start_engine(config, dp)
    batches = list(batches_of(config, 0, engine.mesh.data))
    validation = engine.evaluate(iter(batches), len(batches))
    engine.close()
    report = train_on_rank(config, dp)
    return report.steps[0].loss, validation, report.gradients


@pytest.mark.parametrize(
    "layout",
    [
        Layout(micro_batch_size=2),
        Layout(tp=2, pp=2, micro_batch_size=4),
        Layout(dp=2, zero_stage=3, micro_batch_size=2),
    ],
    ids=str,
)
def test_they_move_the_gradient_and_not_the_loss(layout):
    plain, gradients = expected()
    answers = run_ranks(train_and_evaluate, layout.world_size, config_of(layout), layout.dp)
    for loss, validation, _ in answers:
        assert loss == pytest.approx(plain, rel=1e-6) and validation == pytest.approx(plain, rel=1e-6)
    ours = merge([pieces for _, _, pieces in answers])
    assert ours.keys() >= gradients.keys() - {"head.tokens.weight"}
    for name, values in ours.items():
        wanted = gradients[name][: len(values)]
        assert (values - wanted).abs().max() < 1e-4 * wanted.abs().max() + 1e-9, name
