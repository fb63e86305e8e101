"""The gradient noise scale: right in the mean, and of the gradients that it says, on every layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from megagpt.config import LogConfig, ModelConfig, RunConfig, TrainConfig
from megagpt.errors import UserError
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.plan.plan import make_plan
from megagpt.processes.local import run_ranks
from megagpt.train.measure.noise_scale import DECAY, NoiseScale
from tests.parity.rank import batches_of, start_engine
from tests.parity.walk import Layout, parity_config, spread_out

MODEL = ModelConfig(n_layers=2, d_model=32, n_heads=4, seq_len=16, vocab_size=211)


def test_both_estimates_are_right_in_the_mean():
    """Gradients of known mean and covariance, batches of changing sizes."""
    random, n, d = np.random.default_rng(0), 4000, 40
    mean, deviation = random.normal(size=d), random.uniform(0.5, 3.0, size=d)
    estimates = []
    for i in range(n):
        small_tokens, big_tokens = [(2, 8), (4, 12), (1, 16)][i % 3]
        gradients = mean + deviation * random.normal(size=(big_tokens, d))
        small, big = (float((gradients[:k].mean(0) ** 2).sum()) for k in (small_tokens, big_tokens))
        once = NoiseScale().after(small, big, small_tokens, big_tokens)
        estimates.append((once.signal / (1 - DECAY), once.noise / (1 - DECAY)))
    found, error = np.mean(estimates, axis=0), np.std(estimates, axis=0) / np.sqrt(n)
    wanted = np.array([(mean**2).sum(), (deviation**2).sum()])
    assert (abs(found - wanted) < 4 * error).all() and (error < 0.02 * wanted).all(), (found, wanted, error)


def test_the_quotient_settles_on_the_noise_scale():
    random, d = np.random.default_rng(1), 200
    mean, scale = random.normal(size=d), NoiseScale()
    true = 9.0 * d / (mean**2).sum()
    for _ in range(2000):
        gradients = mean + 3.0 * random.normal(size=(64, d))
        small, big = (float((gradients[:k].mean(0) ** 2).sum()) for k in (8, 64))
        scale = scale.after(small, big, 8, 64)
    assert scale.tokens == pytest.approx(true, rel=0.1)


def test_no_quotient_where_an_estimate_makes_no_sense():
    assert NoiseScale().tokens is None
    assert NoiseScale().after(10.0, 1.0, 1, 2).tokens is None  # |G|² below 0
    assert NoiseScale().after(1.0, 2.0, 1, 2).tokens is None  # tr(Σ) below 0


def config_of(layout: Layout, precision: str = "fp32", **model: Any) -> RunConfig:
    config = spread_out(parity_config(dataclasses.replace(MODEL, **model)), layout)
    ramp = {"seq_len_start": 8, "seq_len_warmup_steps": 1}  # 8 tokens in the first step, and then 16
    train = dataclasses.replace(config.train, global_batch_size=12, train_steps=2, precision=precision, **ramp)
    return dataclasses.replace(config, train=train, log=LogConfig(noise_scale=True))


def measure(config: RunConfig, dp: int, fp16: bool = False) -> list[dict[str, float]]:
    if fp16:
        type(get_accelerator()).is_fp16_supported = lambda self: True  # slow on a CPU, but it computes
    engine = start_engine(config, dp)
    assert engine.noise is not None
    states = []
    for step in range(2):
        engine.train_step(step, batches_of(config, step, engine.mesh.data))
        states.append(engine.noise.state)
        engine.noise.go_on_from({})
    engine.close()
    return states


def expected(layout: Layout, **model: Any) -> dict[str, float]:
    """Of the first step: a gradient for each example, in float64 and one by one."""
    config = config_of(dataclasses.replace(layout, micro_batch_size=1), **model)
    gpt = GPT(config.model, SINGLE, config.train.seed).double()
    gradients = []
    for batch in batches_of(config, 0):
        gpt.zero_grad()
        gpt(batch.tokens_BT, batch.sample_ids_B, batch.labels_BT).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in gpt.parameters() if p.grad is not None]))
    micro, big = layout.micro_batch_size, torch.stack(gradients).mean(0).square().sum().item()
    firsts = [torch.stack(gradients[r * micro : (r + 1) * micro]).mean(0) for r in range(layout.dp)]
    small = np.mean([first.square().sum().item() for first in firsts])
    return dataclasses.asdict(NoiseScale().after(float(small), big, micro * 8, 12 * 8))


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        (Layout(micro_batch_size=2), {}),
        (Layout(tp=2, micro_batch_size=3), {"tied_embeddings": False}),
        (Layout(pp=2, micro_batch_size=2), {}),  # the tied matrix has half of its gradient on each stage
        (Layout(tp=2, pp=2, dp=2, zero_stage=1, micro_batch_size=2), {}),
        (Layout(pp=2, dp=2, zero_stage=1, micro_batch_size=1), {"tied_embeddings": False}),
        (Layout(dp=2, zero_stage=3, micro_batch_size=2), {}),
        (Layout(dp=2, zero_stage=2, micro_batch_size=6), {}),  # one micro-batch a rank
    ],
    ids=str,
)
def test_it_is_of_the_first_micro_batches(layout, model):
    wanted = expected(layout, **model)
    for first, second in run_ranks(measure, layout.world_size, config_of(layout, **model), layout.dp):
        assert first == pytest.approx(wanted, rel=1e-4)
        assert second.keys() == wanted.keys() and second != first


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "layout",
    [Layout(pp=2, zero_stage=1, micro_batch_size=2), Layout(dp=2, zero_stage=2, micro_batch_size=2)],
    ids=str,
)
def test_16_bits_stay_near(layout, precision):
    config, wanted = config_of(layout, precision), expected(layout)
    for first, _ in run_ranks(measure, layout.world_size, config, layout.dp, precision == "fp16"):
        assert first == pytest.approx(wanted, rel=0.05)


def test_one_batch_size_is_refused():
    train = TrainConfig(micro_batch_size=8, global_batch_size=8)
    config = RunConfig(model=MODEL, train=train, log=LogConfig(noise_scale=True))
    with pytest.raises(
        UserError, match=r"log.noise_scale with micro_batch_size=8 compares .*smaller --micro-batch-size"
    ):
        make_plan(config, 1)
