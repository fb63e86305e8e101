"""The memory formula against published ones, and activations against what autograd really saves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megagpt.config import LoraConfig, ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.plan.plan import make_plan

SMALL = ModelConfig(n_layers=3, d_model=64, n_heads=4, seq_len=32, vocab_size=256)


def run(model=SMALL, *, precision="fp32", micro=2, batch=16, **parallel) -> RunConfig:
    train = TrainConfig(micro_batch_size=micro, global_batch_size=batch, precision=precision)
    return RunConfig(model=model, parallel=ParallelConfig(**parallel), train=train)


@pytest.mark.parametrize(
    ("precision", "zero_stage", "bytes_a_parameter"),
    # dp = 4. Rajbhandari et al. 2020, figure 1, with K = 12: 2 + 2 + K/4, 2 + (2 + K)/4, (4 + K)/4
    [
        ("fp16", 1, 7),
        ("fp16", 2, 5.5),
        ("fp16", 3, 4),
        ("bf16", 1, 9),  # gradients accumulate in fp32
        ("fp32", 0, 16),  # no second copy of the weights
        ("fp32", 1, 11),
    ],
)
def test_model_states(precision, zero_stage, bytes_a_parameter):
    plan = make_plan(run(precision=precision, zero_stage=zero_stage), world_size=4)
    memory = plan.stages[0].memory
    states = memory.weights + memory.gradients + memory.optimizer
    assert states == pytest.approx(bytes_a_parameter * plan.stages[0].params_local, abs=4)


def test_offload_moves_the_optimizer_to_the_host():
    kept = make_plan(run(), 2).stages[0].memory
    moved = make_plan(run(offload_optimizer=True), 2).stages[0].memory
    assert (moved.optimizer, moved.host) == (0, kept.optimizer)
    assert moved.total == kept.total - kept.optimizer


@pytest.mark.parametrize(("zero_stage", "copies"), [(0, 1), (1, 2), (2, 2)])
def test_zero_lays_the_weights_end_to_end_at_the_start(zero_stage: int, copies: int):
    memory = make_plan(run(zero_stage=zero_stage), 4).stages[0].memory
    assert memory.start == copies * memory.weights < memory.total


def test_zero_3_has_one_parameter_whole_at_the_start():
    """Of many ranks, that one is most of it: the table of tokens, or a matrix of the MLP."""
    wide = replace(SMALL, vocab_size=2**20, seq_len=1)
    for model, largest in ((SMALL, 4 * 64 * 64), (wide, 64 * 2**20)):
        memory = make_plan(run(model, zero_stage=3), 8).stages[0].memory
        assert memory.start == max(memory.weights + 4 * largest, 2 * memory.weights) <= memory.total


def test_activations_are_korthikanti_s_without_the_stored_masks():
    """Section 4.1: s b h (34 + 5 a s / h) bytes a layer in 16 bits; one byte less for each mask element."""
    model = replace(SMALL, dropout_attention=0.1, n_layers=8)
    s, b, h, a = model.seq_len, 2, model.d_model, model.n_heads

    def of_blocks(n: int) -> int:
        return make_plan(run(replace(model, n_layers=n), precision="bf16"), 1).stages[0].memory.activations

    published = s * b * h * (34 + 5 * a * s / h)
    masks = s * b * h * 2 + a * s * s * b
    assert of_blocks(8) - of_blocks(7) == published - masks


def test_recompute_keeps_one_input_a_block():
    plain = make_plan(run(), 1).stages[0].memory.activations
    model = replace(SMALL, n_layers=4)
    kept = make_plan(run(recompute=True), 1).stages[0].memory.activations
    one_more = make_plan(run(model, recompute=True), 1).stages[0].memory.activations
    assert kept < plain
    assert one_more - kept == 2 * SMALL.seq_len * SMALL.d_model * 4


def test_earlier_stages_keep_more_micro_batches():
    activations = [s.memory.activations for s in make_plan(run(pp=3), 3).stages]
    assert activations[0] == pytest.approx(1.5 * activations[1])
    assert activations[2] < activations[1]


KINDS = {
    "usual": {},
    "own widths": {"d_ff": 128, "d_head": 32},
    "attention dropout": {"dropout_attention": 0.1},
    "attention dropout, own widths": {"dropout_attention": 0.1, "d_ff": 128, "d_head": 32},
    "rotary, shared keys": {"position": "rotary", "n_kv_heads": 2},
    "one key head, SwiGLU": {"n_kv_heads": 1, "activation": "swiglu", "norm": "rmsnorm"},
    "parallel": {"block": "parallel"},
    "parallel, two norms": {"block": "parallel_two_norms"},
    "post": {"norm_position": "post"},
    "ALiBi": {"position": "alibi"},
    "T5": {"position": "t5"},
    "Transformer-XL": {"position": "transformer_xl"},
    "Transformer-XL, one key head": {"position": "transformer_xl", "n_kv_heads": 1},
    "windows": {"attention": ("dense", "window:8"), "dropout_attention": 0.1},
    "low rank": {"mlp": "low_rank", "mlp_rank": 8, "activation": "geglu"},
    "Monarch": {"mlp": "monarch", "mlp_blocks": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_what_autograd_saves(kind):
    """Distinct storages that the backward pass of a block holds on to, parameters aside."""
    model = replace(SMALL, dropout_residual=0.1, **KINDS[kind])
    saved = [saved_bytes(replace(model, n_layers=n)) for n in (2, 3)]
    planned = [make_plan(run(replace(model, n_layers=n)), 1).stages[0].memory.activations for n in (2, 3)]
    # Beside the formula: mean and deviation of two norms, attention's log-sum-exp and mask, sample ids.
    small = 2 * 2 * (2 * 2 + model.n_heads) * model.seq_len * 4 + model.seq_len**2 + 1024
    assert 0 <= (saved[1] - saved[0]) - (planned[1] - planned[0]) <= small


LORAS = {
    "all": {},
    "with dropout": {"dropout": 0.1},
    "queries, keys and values": {"targets": ("qkv",)},
    "MLP's last": {"targets": ("down",), "dropout": 0.1},
}


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("kind", ["usual", "one key head, SwiGLU", "parallel"])
def test_adapters_need_fewer_activations_and_no_more_than_is_planned(kind, lora):
    """As autograd saves them, layer by layer. Beside the formula: as above."""
    model, lora = replace(SMALL, dropout_residual=0.1, **KINDS[kind]), LoraConfig(rank=4, **LORAS[lora])
    saved = [saved_bytes(replace(model, n_layers=n), lora) for n in (2, 3)]
    plans = [make_plan(replace(run(replace(model, n_layers=n)), lora=lora), 1).stages[0].memory for n in (2, 3)]
    planned = plans[1].activations - plans[0].activations
    small = 2 * 2 * (2 * 2 + model.n_heads) * model.seq_len * 4 + model.seq_len**2 + 1024
    assert 0 <= (saved[1] - saved[0]) - planned <= small


def test_what_is_frozen_has_neither_gradient_nor_moments():
    model = replace(SMALL, n_layers=1)
    memory = make_plan(replace(run(model), lora=LoraConfig(rank=4)), 1).stages[0].memory
    D = model.d_model
    adapters = 4 * ((D + 3 * D) + (D + D) + (D + 4 * D) + (4 * D + D))  # rank times inputs and outputs
    assert memory.gradients == 4 * adapters
    assert memory.optimizer == 2 * 4 * adapters
    whole = make_plan(run(model), 1).stages[0].memory
    assert memory.weights == whole.weights + 4 * adapters
    sharded = make_plan(replace(run(model, zero_stage=1), lora=LoraConfig(rank=4)), 4).stages[0].memory
    assert sharded.start == memory.weights + 4 * adapters  # ZeRO lays end to end what it trains alone


def saved_bytes(model: ModelConfig, lora: LoraConfig | None = None) -> int:
    gpt = GPT(model, SINGLE, lora=lora)
    weights = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage  # kept alive, so that no address is used twice
        return tensor

    tokens_BT = torch.zeros(2, model.seq_len, dtype=torch.int64)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = gpt(tokens_BT, labels_BT=tokens_BT)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in storages.values())
