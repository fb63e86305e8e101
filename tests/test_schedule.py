"""The course of a run: against the schedules of torch, transformers, Megatron and DeepSpeed, and published points."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megagpt.config import ModelConfig, OptimConfig, RunConfig, TrainConfig
from megagpt.errors import UserError
from megagpt.schedule import Schedule


def schedule(optim: dict | None = None, seq_len: int = 16, **train) -> Schedule:
    model = ModelConfig(seq_len=seq_len, vocab_size=100)
    return Schedule(RunConfig(model=model, optim=OptimConfig(**(optim or {})), train=TrainConfig(**train)))


# The learning rate.


@pytest.mark.parametrize(("warmup", "decay"), [(0, None), (1, None), (5, None), (5, 20), (30, 40)])
@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_a_decay_is_torchs(kind, warmup, decay):
    optim = {"lr": 0.3, "schedule": kind, "warmup_steps": warmup, "decay_steps": decay, "min_lr_fraction": 0.1}
    ours, end = schedule(optim, train_steps=50), decay or 50
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    if kind == "cosine":
        decline: Any = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=end - warmup, eta_min=0.03)
    else:
        decline = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=end - warmup)
    scheduler = decline
    if warmup:
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=max(1, warmup - 1))
        scheduler = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, decline], milestones=[warmup])
    for step in range(end + 1):
        assert ours.learning_rate(step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        scheduler.step()
    assert ours.learning_rate(10 * end) == pytest.approx(0.03)


def of_transformers(make, steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.3)
    scheduler = make(optimizer, **settings)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_inverse_square_root_and_wsd_are_transformers():
    """After the warm-up: theirs begins at 0, ours at one step of it."""
    from transformers import optimization  # 2 s, and no other test needs it

    theirs = of_transformers(optimization.get_inverse_sqrt_schedule, 400, num_warmup_steps=25)
    ours = schedule({"lr": 0.3, "schedule": "inverse_sqrt", "warmup_steps": 25})
    assert [ours.learning_rate(s) for s in range(25, 400)] == pytest.approx(theirs[25:], rel=1e-12)

    settings = {"num_warmup_steps": 10, "num_training_steps": 200, "num_decay_steps": 50, "min_lr_ratio": 0.1}
    theirs = of_transformers(optimization.get_wsd_schedule, 220, decay_type="linear", **settings)
    optim = {"lr": 0.3, "schedule": "wsd", "warmup_steps": 10, "decay_fraction": 0.25, "min_lr_fraction": 0.1}
    ours = schedule(optim, train_steps=200)
    assert [ours.learning_rate(s) for s in range(10, 220)] == pytest.approx(theirs[10:], rel=1e-12)


def test_gpt3_in_tokens():
    """Brown et al. 2020, appendix B: 375M tokens of warm-up, a cosine to 10 % at 260B tokens, then no change."""
    optim = {"lr": 6e-5, "warmup_tokens": 375_000_000, "decay_tokens": 260_000_000_000}
    ramp: dict[str, Any] = {"batch_ramp_start": 16, "batch_ramp_tokens": 4_000_000_000, "batch_ramp_increment": 16}
    ours = schedule(optim, seq_len=2048, train_steps=100_000, global_batch_size=1600, **ramp)

    def rate_at(tokens: float) -> float:
        return ours.learning_rate(ours.first_step_after(int(tokens)))

    assert ours.batch_size(0) * 2048 == 32_768  # "32k tokens"
    assert ours.batch_size(ours.first_step_after(4_000_000_000)) * 2048 == 3_276_800  # "3.2M"
    assert rate_at(187.5e6) == pytest.approx(3e-5, rel=2e-3)
    assert rate_at(375e6) == pytest.approx(6e-5, rel=1e-6)
    assert rate_at((260e9 + 375e6) / 2) == pytest.approx(6e-5 * 0.55, rel=1e-3)
    assert rate_at(260e9) == rate_at(290e9) == pytest.approx(6e-6)


def test_palm_and_gopher():
    """PaLM, section 5: 1e-2 for 10,000 steps, then 1 / sqrt(k); 512, 1024 and 2048 sequences. Gopher: from 1e-7."""
    optim = {"lr": 1e-2, "schedule": "inverse_sqrt", "warmup_steps": 0, "hold_steps": 10_000}
    train: dict[str, Any] = {
        "global_batch_size": 2048,
        "batch_steps": "512@1,1024@50001,2048@115001",
        "train_steps": 255_000,
    }
    palm = schedule(optim, seq_len=2048, **train)
    for step in (0, 9_999):
        assert palm.learning_rate(step) == 1e-2
    for step in (10_000, 62_500, 250_000):
        assert palm.learning_rate(step) == pytest.approx(1 / math.sqrt(step))
    assert [palm.batch_size(s) for s in (0, 49_999, 50_000, 114_999, 115_000)] == [512, 512, 1024, 1024, 2048]
    assert palm.total_tokens == pytest.approx(780e9, rel=0.02)
    gopher = schedule({"lr": 4e-5, "warmup_from": 1e-7, "warmup_steps": 1500}, train_steps=50_000)
    assert gopher.learning_rate(0) == pytest.approx(1e-7 + (4e-5 - 1e-7) / 1500)
    assert gopher.learning_rate(1499) == pytest.approx(4e-5)


def test_the_rate_is_what_it_was():
    """To the bit: curves of finished runs were recorded with it."""
    ours = schedule({"lr": 2e-3, "warmup_steps": 20}, train_steps=500)
    expected = {0: "0x1.a36e2eb1c432dp-14", 19: "0x1.0624dd2f1a9fcp-9", 20: "0x1.0624dd2f1a9fcp-9"}
    for step in range(20, 500):
        progress = min(1.0, (step - 20) / 480)
        floor = 2e-3 * 0.1
        expected[step] = (floor + (2e-3 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))).hex()
    assert {step: ours.learning_rate(step).hex() for step in expected} == expected


@given(
    kind=st.sampled_from(["cosine", "linear", "inverse_sqrt", "constant", "wsd"]),
    warmup=st.integers(0, 30),
    in_tokens=st.booleans(),
    hold=st.integers(0, 20),
)
def test_rates_rise_hold_and_fall(kind, warmup, in_tokens, hold):
    """On either clock: with a constant batch, tokens are steps times a number."""
    batch_tokens = 8 * 16
    optim: dict[str, Any] = {"lr": 0.3, "schedule": kind, "warmup_steps": warmup, "hold_steps": hold}
    optim |= {"warmup_from": 0.1}
    if kind == "inverse_sqrt" and warmup + hold == 0:
        return
    of_steps = schedule(optim, train_steps=100)
    if in_tokens and warmup:
        optim |= {"warmup_steps": 7, "warmup_tokens": warmup * batch_tokens}
    if in_tokens and kind not in ("inverse_sqrt", "constant"):
        optim |= {"decay_tokens": 100 * batch_tokens}
    ours = schedule(optim, train_steps=100)
    rates = [ours.learning_rate(step) for step in range(130)]
    assert rates == pytest.approx([of_steps.learning_rate(step) for step in range(130)], rel=1e-12)
    peak = warmup + hold
    assert all(b >= a - 1e-15 for a, b in pairwise(rates[:peak]))
    assert all(b <= a + 1e-15 for a, b in pairwise(rates[peak:]))
    assert max(rates) == pytest.approx(0.3) and min(rates) >= 0.03 * (1 - 1e-12)
    assert rates[warmup : peak + 1] == pytest.approx([0.3] * (hold + 1))


WRONG_RATES = {
    "two ends": ({"decay_steps": 5, "decay_tokens": 5}, "both end the decay; give one"),
    "no end": ({"schedule": "constant", "decay_steps": 5}, "optim.schedule=constant with .* would not look at that"),
    "no beginning": ({"schedule": "inverse_sqrt", "warmup_steps": 0}, "give --optim.hold-steps .PaLM: 10000"),
    "long warm-up": ({"warmup_tokens": 9, "decay_tokens": 5}, "optim.warmup_tokens=9 is not below decay_tokens=5"),
    "falling warm-up": ({"warmup_from": 1.0}, "optim.warmup_from=1.0 is above lr=0.002"),
}


@pytest.mark.parametrize("case", WRONG_RATES)
def test_a_rate_that_makes_no_sense_is_refused(case):
    settings, message = WRONG_RATES[case]
    with pytest.raises(UserError, match=message):
        OptimConfig(**settings)


# Batches and sequence lengths.

RAMPS = st.fixed_dictionaries(
    {
        "increments": st.integers(1, 12),
        "increment": st.integers(1, 6),
        "start": st.integers(1, 9),
        "tokens": st.integers(1, 20_000),
        "seq": st.one_of(st.none(), st.tuples(st.integers(1, 15), st.integers(1, 40), st.integers(1, 9))),
        "by_step": st.booleans(),
    }
)


def of_ramp(ramp: dict) -> Schedule:
    size = ramp["start"] + ramp["increments"] * ramp["increment"]
    train: dict[str, Any] = {"global_batch_size": size}
    if ramp["by_step"]:
        sizes = range(ramp["start"], size + 1, ramp["increment"])
        train["batch_steps"] = ",".join(f"{size}@{1 + i * (3 + i)}" for i, size in enumerate(sizes))
    else:
        train |= {"batch_ramp_start": ramp["start"], "batch_ramp_tokens": ramp["tokens"]}
        train |= {"batch_ramp_increment": ramp["increment"]}
    if ramp["seq"]:
        start, steps, increment = ramp["seq"]
        train |= {"seq_len_start": start, "seq_len_warmup_steps": steps, "seq_len_increment": increment}
    return schedule(**train)


@given(ramp=RAMPS)
def test_sums_are_those_of_the_steps(ramp):
    """Every step's size by its definition, one after the other, and what they add up to."""
    ours, samples, tokens = of_ramp(ramp), 0, 0
    size = ramp["start"] + ramp["increments"] * ramp["increment"]
    for step in range(120):
        assert ours.samples_before(step) == samples and ours.tokens_before(step) == tokens
        if not ramp["by_step"]:
            level = min(ramp["increments"], tokens * ramp["increments"] // ramp["tokens"])
            assert ours.batch_size(step) == ramp["start"] + level * ramp["increment"]
        if ramp["seq"]:
            start, steps, increment = ramp["seq"]
            grown = (16 - start) * step // steps // increment * increment
            assert ours.seq_len(step) == (16 if step >= steps else start + grown)
        assert ours.positions(step) == range(samples, samples + ours.batch_size(step))
        assert ours.first_step_after(tokens) == step
        assert ours.first_step_after(tokens + 1) == step + 1
        samples += ours.batch_size(step)
        tokens += ours.batch_size(step) * ours.seq_len(step)
    assert ours.batch_size(10**6) == size and ours.seq_len(10**6) == 16


def test_a_ramp_is_megatrons():
    """Which counts in samples; with one sequence length, tokens are samples times a number."""
    calculator = pytest.importorskip("megatron.core.num_microbatches_calculator", reason="megatron-core not installed")
    theirs = calculator.RampupBatchsizeNumMicroBatchesCalculator(96, 2, 2, False, 0, 8, 8, 3001)
    ramp: dict[str, Any] = {"batch_ramp_start": 8, "batch_ramp_increment": 8, "batch_ramp_tokens": 3001 * 16}
    ours = schedule(global_batch_size=96, **ramp)
    for step in range(200):
        theirs.update(ours.samples_before(step), consistency_check=True)
        assert ours.batch_size(step) == theirs.get_current_global_batch_size(), step
    assert ours.batch_size(0) == 8 and ours.batch_size(199) == 96


def test_sequence_lengths_are_deepspeeds():
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    theirs = CurriculumScheduler(
        {
            "min_difficulty": 64,
            "max_difficulty": 1024,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": 777, "difficulty_step": 8},
        }
    )
    ours = schedule(seq_len=1024, seq_len_start=64, seq_len_warmup_steps=777)
    assert [ours.seq_len(s) for s in range(1000)] == [theirs.get_difficulty(s) for s in range(1000)]


def test_a_long_run_costs_nothing():
    """500,000 steps: as many phases as changes, not as steps."""
    ramp: dict[str, Any] = {"batch_ramp_start": 32, "batch_ramp_increment": 32, "batch_ramp_tokens": 12_000_000_000}
    ours = schedule(seq_len=2048, global_batch_size=1920, train_steps=500_000, **ramp)
    assert len(ours.phases) == 60  # 59 increments (MT-NLG: 32 to 1920 over 12B tokens)
    assert ours.tokens_before(ours.phases[-1].first_step) - 12_000_000_000 < 1888 * 2048


WRONG_SIZES = {
    "half a ramp": ({"batch_ramp_start": 2}, "batch_ramp_start=2, batch_ramp_tokens=None belong together"),
    "no ramp": ({"batch_ramp_increment": 2}, "belong together"),
    "down": ({"batch_ramp_start": 8, "batch_ramp_tokens": 9}, "batch_ramp_start=8 is not below global_batch_size=8"),
    "past": ({"batch_ramp_start": 3, "batch_ramp_tokens": 9}, "increment=3 from 3 does not .* --global-batch-size 9"),
    "both": (
        {"batch_ramp_start": 4, "batch_ramp_tokens": 9, "batch_steps": "4@1,8@5"},
        "cannot go with batch_steps",
    ),
    "end": ({"batch_steps": "4@1,6@5"}, "must end with global_batch_size=8; use --global-batch-size 6"),
    "half a length": ({"seq_len_start": 4}, "seq_len_start=4, seq_len_warmup_steps=None belong together"),
    "many": (
        {"batch_ramp_start": 1, "batch_ramp_tokens": 9, "global_batch_size": 99_999},
        "batch_ramp_increment=1 makes 99,998 of them; use a larger",
    ),
}


@pytest.mark.parametrize("case", WRONG_SIZES)
def test_a_size_that_makes_no_sense_is_refused(case):
    settings, message = WRONG_SIZES[case]
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)
