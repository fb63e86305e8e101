"""make_plan: sizes against the model itself, batch arithmetic, stages, and each refusal."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megagpt.config import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megagpt.errors import UserError
from megagpt.inventory.layers import layers
from megagpt.model.gpt import GPT, layer_list
from megagpt.parallel.axis import Axis
from megagpt.parallel.parameter import declared_of
from megagpt.plan.plan import make_plan

SMALL = ModelConfig(n_layers=6, d_model=48, n_heads=6, seq_len=32, vocab_size=1000)


def run(model: ModelConfig = SMALL, *, tp=1, pp=1, micro=1, batch=16, precision="fp32", **parallel) -> RunConfig:
    return RunConfig(
        model=model,
        parallel=ParallelConfig(tp=tp, pp=pp, **parallel),
        train=TrainConfig(micro_batch_size=micro, global_batch_size=batch, precision=precision),
    )


def attention(model: ModelConfig, choice: str) -> RunConfig:
    config = run(model)
    return replace(config, train=replace(config.train, kernels=f"auto,attention={choice}"))


MODELS = {
    "gpt2": SMALL,
    "untied": replace(SMALL, tied_embeddings=False),
    "no positions": replace(SMALL, position="none"),
    "own widths": replace(SMALL, d_head=16, d_ff=100),
    "rotary, RMSNorm, SwiGLU": replace(SMALL, position="rotary", norm="rmsnorm", activation="swiglu"),
    "ALiBi": replace(SMALL, position="alibi"),
    "PaLM": replace(
        SMALL, block="parallel", position="rotary", n_kv_heads=1, d_head=10, activation="swiglu",
        bias_attention=False, bias_mlp=False, bias_norm=False,
    ),
    "two heads of keys, two norms": replace(SMALL, n_kv_heads=2, block="parallel_two_norms"),
    "GPT-J": replace(SMALL, block="parallel", bias_attention=False, bias_head=True, tied_embeddings=False),
    "GPT-1": replace(SMALL, norm_position="post", final_norm=False),
    "BLOOM": replace(SMALL, position="alibi", embedding_norm=True),
    "Transformer-XL": replace(SMALL, position="transformer_xl", norm="rmsnorm"),
    "T5": replace(SMALL, position="t5", n_kv_heads=2),
    "sinusoidal, biases in norms only": replace(
        SMALL, position="sinusoidal", bias_attention=False, bias_mlp=False, embedding_norm=True
    ),
}  # fmt: skip


@pytest.mark.parametrize("model", [SMALL, replace(SMALL, tied_embeddings=False, n_kv_heads=1)])
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 3)])
def test_sizes_are_those_of_the_stages(model, tp, pp):
    """What a rank of a stage holds, a tied copy and padding included, against the layers that it would build."""
    config = run(model, tp=tp, pp=pp)
    plan, axis = make_plan(config, world_size=tp * pp), Axis(group=None, rank=0, size=tp)
    with torch.device("meta"):
        whole, listed = GPT(model, axis), layer_list(model, axis, seed=0)
        stages = [listed[stage.first_layer : stage.last_layer + 1] for stage in plan.stages]
        built = [whole] if pp == 1 else [torch.nn.ModuleList(layer.build() for layer in stage) for stage in stages]
    for stage, module in zip(plan.stages, built, strict=True):
        assert stage.params_local == sum(p.numel() for p in module.parameters())
        assert stage.params == sum(declared_of(p).size for p in module.parameters())
    assert plan.params == sum(declared_of(p).size for p in whole.parameters())


def test_padding_is_that_of_the_layers():
    plan = make_plan(run(replace(SMALL, vocab_size=50257), tp=2), world_size=2)
    assert plan.vocab_local == 25216  # ceil(50257 / 2) = 25129, up to 197 * 128
    assert plan.vocab_padded == 50432


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_that_torch_counts(name):
    """Forward and backward of one batch under torch's counter; V = 1024 so that padding adds nothing."""
    model = replace(MODELS[name], vocab_size=1024)
    gpt = GPT(model, Axis(group=None, rank=0, size=1))
    tokens_BT = torch.zeros(2, model.seq_len, dtype=torch.int64)
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        gpt(tokens_BT, labels_BT=tokens_BT).backward()
    planned = make_plan(run(model), world_size=1).flops_per_token * tokens_BT.numel()
    if model.position == "transformer_xl":  # its positions are projected once a micro-batch: forward, and the weight's
        planned += model.n_layers * 2 * 2 * model.seq_len * model.d_model**2
    assert counter.get_total_flops() == planned


@pytest.mark.parametrize(("pattern", "share"), [("window:8", 8 * 9 / 2 + 24 * 8), ("strided:16", 32 * 33 / 2 - 120)])
def test_a_pattern_counts_the_pairs_that_it_lets_through(pattern, share):
    """Attention alone: the sparse layer's FLOPs are those of the dense one times its share of the causal pairs."""
    model = replace(SMALL, attention=("dense", pattern))
    dense, sparse = (layer.flops_per_token for layer in layers(model)[1:3])
    of_attention = 4 * SMALL.d_model * SMALL.seq_len
    assert dense - sparse == pytest.approx(of_attention * (1 - share / (32 * 33 / 2)), abs=1)


def test_flops_by_hand():
    """PaLM's 6 N + 12 L H Q T for GPT-2 small: N = 12 * 12 * 768² + 50257 * 768."""
    gpt2 = ModelConfig(n_layers=12, d_model=768, n_heads=12, seq_len=1024, vocab_size=50257)
    matmul_params = 12 * 12 * 768**2 + 50257 * 768
    assert make_plan(run(gpt2), 1).flops_per_token == 6 * matmul_params + 12 * 12 * 768 * 1024


def ramp(*, micro=1, batch=16, **train) -> RunConfig:
    config = run(micro=micro, batch=batch)
    return replace(config, train=replace(config.train, **train))


def test_batch_arithmetic():
    plan = make_plan(run(tp=2, pp=3, micro=2, batch=48), world_size=24)
    assert (plan.dp, plan.micro_batches, plan.batch_tokens) == (4, 6, 48 * 32)
    assert plan.bubble_fraction == pytest.approx(2 / 8)
    assert [stage.in_flight for stage in plan.stages] == [3, 2, 1]


def test_zero_is_used_where_it_has_something_to_do():
    assert make_plan(run(zero_stage=2), 2).zero_stage == 2
    assert make_plan(run(zero_stage=2), 1).zero_stage == 0
    assert make_plan(run(zero_stage=1, tp=2, pp=2), 4).zero_stage == 0
    assert make_plan(run(zero_stage=1, precision="bf16"), 1).zero_stage == 1
    assert make_plan(run(zero_stage=2, offload_optimizer=True), 1).zero_stage == 2
    with_json = run(zero_stage=1)
    with_json = replace(with_json, train=replace(with_json.train, deepspeed_config="ds.json"))
    assert make_plan(with_json, 1).zero_stage == 1


def test_the_configuration_is_not_changed():
    config = run(tp=2, pp=3)
    before = copy.deepcopy(config)
    make_plan(config, world_size=6)
    assert config == before


REFUSED = {
    "world size": (
        run(tp=2, pp=2),
        6,
        "world size 6 with parallel.tp=2, parallel.pp=2 is not a multiple of tp * pp = 4",
    ),
    "world size, remedy": (
        run(tp=2, pp=2),
        6,
        "use a multiple of 4 processes, or --tp 1 --pp 2, or --tp 2 --pp 1",
    ),
    "no processes": (run(), 0, "world size 0 is no number of processes"),
    "heads": (run(tp=4), 4, "parallel.tp=4 must divide n_heads=6; try 1, 2, 3, 6"),
    "d_ff": (
        run(replace(SMALL, d_ff=50), tp=3),
        3,
        "parallel.tp=3 must divide d_ff=50; try 1, 2, 5, 10, 25, 50",
    ),
    "key heads": (
        run(replace(SMALL, n_heads=12, n_kv_heads=4), tp=6),
        6,
        "parallel.tp=6 with model.n_kv_heads=4 must divide it, or be a multiple of it; try 1, 2, 4, 12",
    ),
    "key heads, another layout": (
        run(replace(SMALL, n_heads=12, n_kv_heads=4), tp=4),
        6,
        "use a multiple of 4 processes, or --tp 2 --pp 1, or --tp 1 --pp 1",
    ),
    "relative positions": (
        attention(replace(SMALL, position="transformer_xl"), "flex"),
        1,
        "train.kernels=auto,attention=flex asks for attention=flex, which has no positions of the kind transformer_xl; "
        "use attention=auto",
    ),
    "T5's positions": (attention(replace(SMALL, position="t5"), "sdpa"), 1, "attention=sdpa, which has no positions"),
    "ALiBi": (attention(replace(SMALL, position="alibi"), "sdpa"), 1, "no positions of the kind alibi"),
    "attention dropout": (
        attention(replace(SMALL, dropout_attention=0.1), "flex"),
        1,
        "attention=flex, which has no attention dropout",
    ),
    "Monarch": (
        run(replace(SMALL, mlp="monarch", mlp_blocks=3), tp=2),
        2,
        "parallel.tp=2 must divide mlp_blocks=3; try 1, 3",
    ),
    "layers": (run(pp=8), 8, "model.n_layers=6 is fewer than parallel.pp=8 stages; use --pp 6 or less"),
    "batch": (
        run(micro=3),
        1,
        "=16 with micro_batch_size=3, dp=1 is not a multiple of micro_batch_size * dp = 3",
    ),
    "batch, remedy": (run(micro=3), 1, "use --global-batch-size 15 or 18, or --micro-batch-size 2"),
    "batch of a ramp": (
        ramp(micro=4, batch=16, batch_steps="4@1,8@5,16@9"),
        2,
        "batch_steps='4@1,8@5,16@9' makes batches of 4, with micro_batch_size=4, dp=2 no multiple of "
        "micro_batch_size * dp = 8; use sizes that are, or --micro-batch-size 2",
    ),
    "increment": (
        ramp(micro=2, batch=16, batch_ramp_start=8, batch_ramp_tokens=99_999, batch_ramp_increment=1),
        2,
        "batch_ramp_start=8, batch_ramp_increment=1 makes batches of 9",
    ),
    "length": (ramp(seq_len_start=32, seq_len_warmup_steps=5), 1, "seq_len_start=32 is not below model.seq_len=32"),
    "small batch": (run(micro=4), 8, "use --global-batch-size 32, or --micro-batch-size 2"),
    "vocabulary": (
        run(replace(SMALL, vocab_size=None)),
        1,
        "model.vocab_size is not known; give --vocab-size",
    ),
    "fp16": (run(zero_stage=0, precision="fp16"), 2, "use --zero-stage 1"),
    "bf16 pipeline": (run(pp=2, zero_stage=0, precision="bf16"), 2, "use --zero-stage 1"),
    "counts, entries": (
        run(pp=2, partition="2,2,2"),
        2,
        "must have pp=2 positive entries, of sum n_layers=6",
    ),
    "counts, sum": (run(pp=2, partition="2,2"), 2, "it has 2 that sum to 4; use for example 3,3"),
    "counts, zero": (run(pp=2, partition="6,0"), 2, "must have pp=2 positive entries"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_one_message_with_a_remedy(name):
    config, world_size, expected = REFUSED[name]
    with pytest.raises(UserError) as caught:
        make_plan(config, world_size)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@st.composite
def valid_runs(draw):
    tp, pp = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 5))
    dp, micro, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 6))
    n_layers = draw(st.integers(pp, 20))
    model = ModelConfig(
        n_layers=n_layers,
        d_model=8 * tp * draw(st.integers(1, 8)),
        n_heads=4 * tp,
        d_head=draw(st.integers(1, 16)),
        d_ff=tp * draw(st.integers(1, 64)),
        seq_len=draw(st.integers(1, 128)),
        vocab_size=draw(st.integers(tp, 5000)),
        tied_embeddings=draw(st.booleans()),
        position=draw(st.sampled_from(["learned", "none"])),
        dropout_attention=draw(st.sampled_from([0.0, 0.1])),
    )
    return run(
        model,
        tp=tp,
        pp=pp,
        micro=micro,
        batch=micro * dp * micro_batches,
        partition=draw(st.sampled_from(["flops", "parameters", "uniform"])),
        recompute=draw(st.booleans()),
    ), tp * pp * dp


@settings(max_examples=150, deadline=None)
@given(valid_runs())
def test_every_plan_is_consistent(run_and_world_size):
    config, world_size = run_and_world_size
    plan = make_plan(config, world_size)
    model, tp = config.model, config.parallel.tp
    assert plan.tp * plan.pp * plan.dp == world_size
    assert plan.micro_batches * config.train.micro_batch_size * plan.dp == config.train.global_batch_size
    # Stages cover the layer list once, in order, with a block each.
    covered = [i for stage in plan.stages for i in range(stage.first_layer, stage.last_layer + 1)]
    assert covered == list(range(model.n_layers + 2))
    assert list(plan.bounds) == [stage.first_layer for stage in plan.stages] + [model.n_layers + 2]
    assert min(stage.n_blocks for stage in plan.stages) >= 1
    assert sum(stage.n_blocks for stage in plan.stages) == model.n_layers
    # Together the ranks hold each logical tensor, plus what is there more than once and what is padding.
    copies = model.vocab * model.d_model if model.tied_embeddings and plan.pp > 1 else 0
    assert sum(stage.params for stage in plan.stages) == plan.params + copies
    matrices = 1 if model.tied_embeddings and plan.pp == 1 else 2
    padding = matrices * (plan.vocab_padded - model.vocab) * model.d_model
    positions = model.seq_len * model.d_model if model.position == "learned" else 0
    replicated = positions + 2 * model.d_model + model.n_layers * 6 * model.d_model
    held = sum(stage.params_local for stage in plan.stages) * tp
    assert held == plan.params + copies + padding + (tp - 1) * replicated
    # A rank's rows, on every rank, hold its chunk of the vocabulary.
    assert plan.vocab_local % 128 == 0
    assert 0 <= plan.vocab_local - -(-model.vocab // tp) < 128
