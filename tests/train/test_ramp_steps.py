"""Runs whose batch and sequences grow: the same on every layout, as a plain loop has it, and resumed in the middle."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megagpt.config import ModelConfig, RunConfig
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.processes.local import run_ranks
from megagpt.schedule import Schedule
from tests.parity.rank import batches_of, start_engine
from tests.parity.walk import REFERENCE, Layout, Outcome, compare, parity_config, run_layout, spread_out

MODEL = ModelConfig(
    n_layers=2, d_model=32, n_heads=4, seq_len=24, vocab_size=211,
    dropout_embedding=0.1, dropout_attention=0.1, dropout_residual=0.1,
)  # fmt: skip
STEPS = 10


def ramp_config() -> RunConfig:
    """Batches of 4, 8 and 12, sequences of 8, 16 and 24, which grow at different steps."""
    config = parity_config(MODEL)
    ramp = {"batch_ramp_start": 4, "batch_ramp_tokens": 420, "seq_len_start": 8, "seq_len_warmup_steps": 5}
    train = dataclasses.replace(config.train, train_steps=STEPS, global_batch_size=12, micro_batch_size=4, **ramp)
    optim = dataclasses.replace(config.optim, warmup_tokens=300, decay_tokens=2000)
    return dataclasses.replace(config, train=train, optim=optim)


def test_the_ramp_is_one():
    schedule = Schedule(ramp_config())
    sizes = [(schedule.batch_size(step), schedule.seq_len(step)) for step in range(STEPS)]
    assert sizes == [(4, 8)] * 3 + [(4, 16)] * 2 + [(8, 24)] * 2 + [(12, 24)] * 3


@pytest.fixture(scope="module")
def reference() -> Outcome:
    return run_layout(ramp_config(), dataclasses.replace(REFERENCE, micro_batch_size=4))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, micro_batch_size=1),
        Layout(pp=2, micro_batch_size=2),
        Layout(dp=2, zero_stage=1, micro_batch_size=2),
        Layout(dp=2, zero_stage=3, micro_batch_size=1),
        Layout(pp=2, dp=2, zero_stage=1, micro_batch_size=1),
        Layout(zero_stage=2, micro_batch_size=4, offload_optimizer=True),  # one micro-batch at first, then three
    ],
    ids=str,
)
def test_a_layout_agrees_with_one_process(reference, layout):
    difference = compare(run_layout(ramp_config(), layout), reference, ramp_config())
    assert difference.ok, difference


def test_a_plain_loop_agrees(reference):
    """torch's own AdamW and clipping, the whole batch of a step at once."""
    config = ramp_config()
    model, optim, schedule = GPT(config.model, SINGLE, config.train.seed), config.optim, Schedule(config)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": optim.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    losses, grad_norms = [], []
    for step in range(STEPS):
        batches = list(batches_of(config, step))
        tokens_BT, labels_BT = torch.cat([b.tokens_BT for b in batches]), torch.cat([b.labels_BT for b in batches])
        loss = model(tokens_BT, torch.cat([b.sample_ids_B for b in batches]), labels_BT)
        loss.backward()
        grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = schedule.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert reference.losses == pytest.approx(losses, rel=3e-6)
    assert reference.grad_norms == pytest.approx(grad_norms, rel=1e-5)


def evaluate_in_between(config: RunConfig, dp: int) -> tuple[list[float], list[float]]:
    """Losses of all steps, with a validation of whole batches before each; and those of the validations."""
    engine = start_engine(config, dp)
    whole = dataclasses.replace(config.train, batch_ramp_start=None, batch_ramp_tokens=None)
    whole = dataclasses.replace(whole, seq_len_start=None, seq_len_warmup_steps=None)
    whole_config = dataclasses.replace(config, train=whole)

    def validate() -> float:
        batches = list(batches_of(whole_config, 50, engine.mesh.data))
        return engine.evaluate(iter(batches), len(batches))

    validations, losses = [], []
    for step in range(STEPS):
        validations.append(validate())
        losses.append(engine.train_step(step, batches_of(config, step, engine.mesh.data)).loss)
    engine.close()
    return losses, validations


def test_validation_reads_whole_batches_and_disturbs_nothing(reference):
    layouts = [Layout(), Layout(pp=2, micro_batch_size=2)]
    answers = [
        run_ranks(evaluate_in_between, layout.world_size, spread_out(ramp_config(), layout), 1)[0] for layout in layouts
    ]
    for losses, validations in answers:
        assert losses == pytest.approx(reference.losses, rel=3e-6)
        assert validations == pytest.approx(answers[0][1], rel=3e-6)
