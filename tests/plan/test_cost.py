"""The cost model against its sources: schedules, collectives, activations, FLOPs, measured runs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from megagpt.config import ModelConfig
from megagpt.plan.footprint import block_bytes, fits, footprint
from megagpt.plan.job import Engine, Job, Layout, local_params
from megagpt.plan.machine import Constants, gpu_names, link_names, machine
from megagpt.plan.network import Group, all_reduce_s, axis_groups, gather_s
from megagpt.plan.pipeline import Durations, estimated_s, pipeline_s, simulate
from megagpt.plan.rows.sources import MEGATRON_2021, NEMO
from megagpt.plan.rows.tables import megatron_flops
from megagpt.plan.step import STEP_KINDS, step_time

GPT3 = ModelConfig(n_layers=96, d_model=12288, n_heads=96, seq_len=2048, vocab_size=51200)
A100 = machine("a100-80g")


def even(pp: int, virtual: int = 1) -> Durations:
    """Stages of 1 s forward and 2 s backward a rank, half of that for weights."""
    n = pp * virtual
    return Durations([1 / virtual] * n, [2 / virtual] * n, [1 / virtual] * n)


@pytest.mark.parametrize("micro_batches", [4, 8, 40])
def test_the_bubble_of_1f1b_is_p_less_1_over_m(micro_batches):
    whole = pipeline_s("1f1b", 4, 1, micro_batches, even(4))
    assert whole / (3 * micro_batches) - 1 == pytest.approx((4 - 1) / micro_batches)  # Narayanan et al. 2021, 2.2.1


def test_interleaved_stages_divide_the_bubble():
    whole = pipeline_s("interleaved", 4, 3, 8, even(4, 3))
    assert whole / (3 * 8) - 1 == pytest.approx((4 - 1) / 8 / 3)  # Narayanan et al. 2021, 2.2.2


def test_zero_bubble_h1_leaves_a_third():
    whole = pipeline_s("zero_bubble", 4, 1, 8, even(4))
    assert whole - 3 * 8 == pytest.approx((4 - 1) * (1 + 1 - 1))  # Qi et al. 2023: (p - 1)(F + B - W)


@pytest.mark.parametrize(("schedule", "virtual"), [("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)])
def test_what_is_extrapolated_is_what_the_whole_simulation_says(schedule, virtual):
    n = 4 * virtual
    uneven = Durations([1.0] * (n - 1) + [1.5], [2.0] * (n - 1) + [3.5], [1.0] * n, 0.1)
    events = simulate(schedule, 4, virtual, 40, uneven)
    assert pipeline_s(schedule, 4, virtual, 40, uneven) == pytest.approx(max(e.end_s for e in events), rel=0.01)
    assert estimated_s(schedule, 4, virtual, 40, uneven) == pytest.approx(max(e.end_s for e in events), rel=0.06)


def test_no_rank_does_two_things_at_once_and_nothing_starts_before_what_it_needs():
    events = simulate("interleaved", 4, 2, 8, even(4, 2))
    ends = {event.task: event.end_s for event in events}
    for rank in range(4):
        own = [e for e in events if e.rank == rank]
        assert all(a.end_s <= b.start_s + 1e-9 for a, b in itertools.pairwise(own))
    for event in events:
        if event.task.kind == "F" and event.task.stage > 0:
            assert ends[event.task._replace(stage=event.task.stage - 1)] <= event.start_s + 1e-9


@pytest.mark.parametrize(
    ("tp", "parallel", "recompute", "bytes_per_sbh"),  # Korthikanti et al. 2022, table 2, with 5 a s / h = 80
    [
        (1, False, "none", 34 + 80),
        (8, False, "none", 10 + 24 / 8 + 80 / 8),
        (8, True, "none", (34 + 80) / 8),
        (8, True, "selective", 34 / 8),
    ],
)
def test_activations_of_a_block_are_those_of_the_table(tp, parallel, recompute, bytes_per_sbh):
    layout = Layout(gpus=tp, tp=tp, sequence_parallel=parallel, recompute=recompute)
    kept = block_bytes(Job(GPT3, layout, MEGATRON_2021, A100))
    assert kept == pytest.approx(bytes_per_sbh * 2048 * 12288, rel=1e-9)


def test_parameters_are_those_of_the_inventory():
    embedding, block, head = local_params(GPT3, 1)
    assert embedding + 96 * block + head == pytest.approx(
        12 * 96 * 12288**2 * (1 + 13 / 12 / 12288) + 53248 * 12288, rel=1e-4
    )


def test_flops_give_the_days_of_the_paper():
    """Narayanan et al. 2021, section 5.1: a trillion parameters, 450e9 tokens, 3072 GPUs at 163 TFLOP/s, 84 days."""
    model = ModelConfig(n_layers=128, d_model=25600, n_heads=160, seq_len=2048, vocab_size=51200)
    job = Job(model, Layout(gpus=3072, tp=8, pp=64, dp=6, global_batch=3072), MEGATRON_2021, A100)
    seconds = megatron_flops(job, 96) / 3072 / 163e12
    assert 450e9 / 3072 / 2048 * seconds / 86400 == pytest.approx(84, abs=1.5)


def test_a_ring_moves_what_it_must():
    quick = A100.with_constants(replace(Constants(), nvlink=1.0, network=1.0, nvlink_us=1e-9, network_us=1e-9))
    assert all_reduce_s(8e9, Group(8, 8), quick) == pytest.approx(2 * 7 / 8 * 8e9 / 300e9)
    assert gather_s(8e9, Group(16, 8), quick) == pytest.approx(15 / 16 * 8e9 / 200e9)  # all 8 adapters
    assert gather_s(8e9, Group(4, 1), quick) == pytest.approx(3 / 4 * 8e9 / 25e9)  # one adapter
    groups = axis_groups(Layout(gpus=64, tp=4, dp=16), quick)
    assert (groups["tensor"].on_node, groups["data"].on_node) == (4, 2)


def test_step_kinds_sum_to_the_step():
    layout = Layout(gpus=64, tp=8, pp=4, dp=2, zero=1, micro_batch=1, global_batch=64, recompute="full")
    step = step_time(Job(GPT3, layout, MEGATRON_2021, A100))
    assert tuple(step.kinds) == STEP_KINDS
    assert sum(step.kinds.values()) == pytest.approx(step.seconds)


@pytest.mark.parametrize(
    ("change", "slower"),
    [({"recompute": "full"}, True), ({"micro_batch": 4}, True), ({"sequence_parallel": True}, False)],
)
def test_what_costs_time_and_what_saves_it(change, slower):
    base = Layout(gpus=64, tp=8, pp=8, dp=1, micro_batch=1, global_batch=16)
    plain = step_time(Job(GPT3, base, MEGATRON_2021, A100)).seconds
    changed = step_time(Job(GPT3, replace(base, **change), MEGATRON_2021, A100)).seconds
    assert (changed > plain) == slower


def test_zero_shares_out():
    def kept(zero: int) -> dict[str, float]:
        return footprint(Job(GPT3, Layout(gpus=8, dp=8, zero=zero), Engine(), A100)).fullest

    assert kept(1)["optimizer"] == pytest.approx(kept(0)["optimizer"] / 8)
    assert kept(2)["gradients"] == pytest.approx(kept(0)["gradients"] / 8)
    assert kept(3)["weights"] == pytest.approx(kept(0)["weights"] / 8)


def test_175_billion_do_not_fit_a_node():
    assert not fits(Job(GPT3, Layout(gpus=8, tp=8, zero=1), Engine(), A100))


MEASURED = {  # copied from the sources: model, layout, engine, GPU, seconds of a step
    "Korthikanti et al. 2022, table 5, 175B": (
        GPT3,
        Layout(
            gpus=64, tp=8, pp=8, virtual=3, micro_batch=1, global_batch=64, recompute="selective",
            sequence_parallel=True, schedule="interleaved",
        ),
        MEGATRON_2021, "a100-80g", 13.75,
    ),
    "Narayanan et al. 2021, table 2, 530B on 2240": (
        ModelConfig(n_layers=105, d_model=20480, n_heads=128, seq_len=2048, vocab_size=51200),
        Layout(gpus=2240, tp=8, pp=35, dp=8, micro_batch=1, global_batch=2240, recompute="full"),
        MEGATRON_2021, "a100-80g", 55.4,
    ),
    "NVIDIA dgxc-benchmarking v25.02, GPT-3 175B on 128": (
        replace(GPT3, vocab_size=50257),
        Layout(
            gpus=128, tp=4, pp=8, virtual=12, dp=4, zero=1, micro_batch=1, global_batch=256, sequence_parallel=True,
            schedule="interleaved",
        ),
        NEMO, "h100-80g", 8.31,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_measured_steps_are_met(name):
    model, layout, engine, gpu, seconds = MEASURED[name]
    assert step_time(Job(model, layout, engine, machine(gpu))).seconds == pytest.approx(seconds, rel=0.2)


def test_every_gpu_and_link_can_be_named():
    for gpu in gpu_names():
        for link in link_names():
            on = machine(gpu, link)
            assert all(math.isfinite(x) and x > 0 for x in (on.flops, on.bandwidth, on.nvlink, on.node_network))
