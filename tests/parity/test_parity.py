"""One run, any layout: a sample of the layouts of `make parity`, and proof that the comparison can fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineModule

from megagpt.config import ModelConfig, RunConfig
from megagpt.data import loader
from megagpt.model.dropout import Dropout
from megagpt.parallel import beginning, collectives
from megagpt.processes.local import run_ranks
from megagpt.train.step.deepspeed import backend
from megagpt.train.step.deepspeed.stages import GPTStage
from tests.parity.rank import RankReport, train_on_rank
from tests.parity.walk import (
    BOUNDS,
    REFERENCE,
    Difference,
    Layout,
    Outcome,
    all_layouts,
    compare,
    outcome_of,
    parity_config,
    require_lively,
    run_layout,
    spread_out,
)

SAMPLE = [
    Layout(tp=2, pp=2, micro_batch_size=2),
    Layout(tp=2, dp=2, zero_stage=2, micro_batch_size=1),
    Layout(dp=2, zero_stage=3, micro_batch_size=2),
    Layout(pp=4, micro_batch_size=1),
    Layout(tp=4, micro_batch_size=8),
    Layout(pp=2, dp=2, zero_stage=1, micro_batch_size=1, recompute=True),
    Layout(tp=2, zero_stage=2, micro_batch_size=2, offload_optimizer=True),
    Layout(tp=2, pp=2, dp=2, zero_stage=1, micro_batch_size=2),
]


@pytest.fixture(scope="module")
def reference() -> Outcome:
    outcome = run_layout(parity_config(), REFERENCE)
    require_lively(outcome, parity_config())
    return outcome


@pytest.mark.parametrize("layout", SAMPLE, ids=str)
def test_a_layout_agrees_with_one_process(reference, layout):
    difference = compare(run_layout(parity_config(), layout), reference, parity_config())
    assert difference.ok, difference


OTHER_MODELS = {
    "rotary, RMSNorm, SwiGLU": {"position": "rotary", "norm": "rmsnorm", "activation": "swiglu", "d_ff": 48},
    "ALiBi, squared ReLU": {"position": "alibi", "activation": "relu2", "dropout_attention": 0.1},
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_architectures_agree_too(name):
    sizes = {"n_layers": 4, "d_model": 32, "n_heads": 4, "seq_len": 24, "vocab_size": 211, "dropout_residual": 0.1}
    config = parity_config(ModelConfig(**sizes, **OTHER_MODELS[name]))
    reference = run_layout(config, REFERENCE)
    require_lively(reference, config)
    for layout in (Layout(tp=2, pp=2, zero_stage=1, micro_batch_size=2), Layout(dp=2, zero_stage=3, recompute=True)):
        difference = compare(run_layout(config, layout), reference, config)
        assert difference.ok, (layout, difference)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, pp=2, zero_stage=1, micro_batch_size=2),
        Layout(dp=2, zero_stage=3, micro_batch_size=1, recompute=True),
        Layout(zero_stage=2, offload_optimizer=True),
    ],
    ids=str,
)
def test_16_bits_stay_near_32(reference, layout, precision):
    config = parity_config(precision=precision)
    ranks = run_ranks(train_in_16_bits, layout.world_size, spread_out(config, layout), layout.dp)
    difference = compare(outcome_of(ranks), reference, config)
    assert difference.ok, difference
    assert difference.loss > BOUNDS["fp32"].loss / 2  # it was not fp32 that ran


def train_in_16_bits(config: RunConfig, dp: int) -> RankReport:
    type(get_accelerator()).is_fp16_supported = lambda self: True  # slow on a CPU, but it computes
    return train_on_rank(config, dp)


def test_all_layouts_are_what_the_promise_says():
    layouts = all_layouts()
    assert len(set(layouts)) == len(layouts)
    for name, values in {"tp": {1, 2, 4}, "pp": {1, 2, 4}, "dp": {1, 2, 4}, "zero_stage": {0, 1, 2, 3}}.items():
        assert {getattr(layout, name) for layout in layouts} == values
    assert {layout.world_size for layout in layouts} == {1, 2, 4, 8}
    assert {(layout.recompute, layout.offload_optimizer) for layout in layouts} >= {(True, False), (False, True)}


def copies_are_not_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded parameters without the flag that DeepSpeed's clipping looks for: each rank clips by its own norm."""
    monkeypatch.setattr(backend, "_mark_sharded", lambda parameters: None)


def tied_copy_counts_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    build = GPTStage.__init__

    def without_mark(stage: GPTStage, *args) -> None:
        build(stage, *args)
        for weight in stage.parameters():
            weight.ds_pipe_replicated = False  # type: ignore[attr-defined]

    monkeypatch.setattr(GPTStage, "__init__", without_mark)


def tied_gradients_are_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PipelineModule, "get_tied_weights_and_groups", lambda stage: [])


def heads_draw_the_same_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Dropout.forward
    monkeypatch.setattr(Dropout, "forward", lambda self, x, sample_ids_B, offset=0: forward(self, x, sample_ids_B))


def samples_are_numbered_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    cut = loader._micro_batch
    renumber = lambda batch: dataclasses.replace(batch, sample_ids_B=torch.arange(len(batch.sample_ids_B)))  # noqa: E731
    monkeypatch.setattr(loader, "_micro_batch", lambda *args, **named: renumber(cut(*args, **named)))


def input_gradients_are_not_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collectives._Copy, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def shards_draw_their_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    fill = beginning.Beginning.fill

    def like_the_first(self: beginning.Beginning, *args: Any) -> torch.Tensor:
        return fill(dataclasses.replace(self, part=dataclasses.replace(self.part, start=0)), *args)

    monkeypatch.setattr(beginning.Beginning, "fill", like_the_first)


Fault = Callable[[pytest.MonkeyPatch], None]
TP2, PP2, DP2 = Layout(tp=2, zero_stage=1), Layout(pp=2, zero_stage=1), Layout(dp=2, zero_stage=1)
FAULTS: list[tuple[Fault, Layout, str, str | None]] = [
    # what is wrong, where it shows, the figure that must see it, and the tensor that must be named
    # with ZeRO in use, whose own clipping looks at the marks
    (copies_are_not_marked, dataclasses.replace(TP2, dp=2), "grad_norm", None),
    (tied_copy_counts_twice, dataclasses.replace(PP2, dp=2), "grad_norm", None),
    (tied_gradients_are_not_summed, PP2, "gradient", "embedding.tokens.weight"),
    (heads_draw_the_same_mask, TP2, "loss", None),
    (samples_are_numbered_by_rank, DP2, "loss", None),
    (input_gradients_are_not_summed, TP2, "gradient", None),
    (shards_draw_their_own_weights, TP2, "loss", None),
]


def train_with(fault: Fault, config: RunConfig, dp: int) -> RankReport:
    fault(pytest.MonkeyPatch())  # this process ends with the run
    return train_on_rank(config, dp)


def shorter(config: RunConfig) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, train_steps=3))


@pytest.fixture(scope="module")
def short_reference() -> Outcome:
    return run_layout(shorter(parity_config()), REFERENCE)


@pytest.mark.parametrize(("fault", "layout", "figure", "tensor"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_fault_is_found(short_reference, fault, layout, figure, tensor):
    config = shorter(parity_config())
    ranks = run_ranks(train_with, layout.world_size, fault, spread_out(config, layout), layout.dp)
    difference: Difference = compare(outcome_of(ranks), short_reference, config)
    assert not difference.ok
    assert getattr(difference, figure) > 30 * getattr(BOUNDS["fp32"], figure), difference
    if tensor:
        assert difference.first_bad_tensor == tensor
