"""What layers declare is what modules hold: of every preset, small, and of models that no one has published."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megagpt.cli import parse_run_config
from megagpt.config import LoraConfig, ModelConfig
from megagpt.inventory.layers import TIED, block, canonical, layers, vocab_local
from megagpt.inventory.parameter import Kept, Parameter, kept_numbers
from megagpt.model.gpt import GPT, layer_list
from megagpt.parallel.axis import Axis
from megagpt.parallel.parameter import declared_of, part_of
from megagpt.presets import preset_names
from tests.parity.shrunken import shrunken

# Of 257 tokens 2 ranks hold 129, padded to 256: rounding down would leave 128.
BASE = ModelConfig(n_layers=3, d_model=24, n_heads=4, d_ff=48, seq_len=16, vocab_size=257)
ODD = {
    "one key head, a bias of logits": replace(BASE, n_kv_heads=1, bias_head=True, tied_embeddings=False, d_head=10),
    "two key heads, Transformer-XL": replace(BASE, n_kv_heads=2, position="transformer_xl", block="parallel"),
    "T5, gated low rank": replace(BASE, position="t5", mlp="low_rank", mlp_rank=5, activation="swiglu"),
    "gated butterfly, RMSNorm": replace(BASE, mlp="butterfly", d_ff=40, activation="geglu", norm="rmsnorm"),
    "Monarch, embedding norm": replace(
        BASE, mlp="monarch", mlp_blocks=4, embedding_norm=True, block="parallel_two_norms"
    ),
    "no biases, post-norm": replace(
        BASE, bias_attention=False, bias_mlp=False, bias_norm=False, norm_position="post", final_norm=False
    ),
    "patterns in turn": replace(BASE, attention=("dense", "window:5"), position="alibi"),
}
Held = dict[str, tuple[tuple[int, ...], int | None, int]]


def models() -> dict[str, ModelConfig]:
    """Each once: many presets are the same when they are small."""
    small = {shrunken(parse_run_config(["--preset", name])).model: name for name in preset_names()}
    return {name: model for model, name in small.items()} | ODD


MODELS = models()


def held(module: torch.nn.Module) -> Held:
    """By name: logical shape, sharded dim, numbers on this rank."""
    return {n: (part_of(p).shape, part_of(p).dim, p.numel()) for n, p in module.named_parameters()}


def declared(parameters: dict[str, Parameter], tp: int) -> Held:
    return {name: (p.shape, p.dim(tp), p.local_size(tp)) for name, p in parameters.items()}


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_modules_hold_what_is_declared(name, tp):
    """Whole, and layer by layer as pipeline stages build them."""
    model = MODELS[name]
    for axis in (Axis(group=None, rank=0, size=tp), Axis(group=None, rank=tp - 1, size=tp)):
        with torch.device("meta"):
            whole = GPT(model, axis)
            built = {layer.name: layer.build() for layer in layer_list(model, axis, seed=0)}
        assert held(whole) == declared(canonical(model), tp)
        assert whole.embedding.tokens.weight.shape[0] == vocab_local(model, tp)
        for layer in layers(model):
            is_tied = layer.name == "head" and model.tied_embeddings
            tied = {"tokens.weight": canonical(model)[TIED]} if is_tied else {}
            assert held(built[layer.name]) == declared(dict(layer.parameters) | tied, tp), layer.name


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", ["one key head, a bias of logits", "no biases, post-norm"])
def test_adapters_are_held_as_declared_and_are_all_that_is_trained(name, tp):
    model, lora = MODELS[name], LoraConfig(rank=3)
    wanted = {f"{layer.name}.{n}": p for layer in layers(model, lora=lora) for n, p in layer.parameters.items()}
    with torch.device("meta"):
        gpt = GPT(model, Axis(group=None, rank=tp - 1, size=tp), lora=lora)
    assert held(gpt) == declared(wanted, tp)
    assert {n for n, p in gpt.named_parameters() if p.requires_grad} == {n for n in wanted if ".lora." in n}
    assert {n for n, p in wanted.items() if not p.trained} == canonical(model).keys()


@pytest.mark.parametrize("name", MODELS)
def test_matrices_decay_and_biases_and_gains_do_not(name):
    with torch.device("meta"):
        model = GPT(MODELS[name], Axis(group=None, rank=0, size=1))
    for key, parameter in model.named_parameters():
        is_vector = key.endswith("bias") or "norm" in key
        assert declared_of(parameter).decays != is_vector, key


@pytest.mark.parametrize("name", MODELS)
def test_blocks_that_repeat_are_declared_like_any_other(name):
    model = replace(MODELS[name], n_layers=7)
    for i, listed in enumerate(layers(model)[1:-1]):
        assert listed == block(model, i)


def test_a_model_by_hand():
    """Names, shapes, what is cut and how heads share it: the facts that checkpoints and converters rely on."""
    model = replace(ODD["one key head, a bias of logits"], n_layers=1, activation="swiglu", norm="rmsnorm")
    found = {n: (p.shape, p.sharded, p.heads, p.maps_per_head, p.kind) for n, p in canonical(model).items()}
    gain = ((24,), None, None, 1, "vector")
    assert found == {
        "embedding.positions": ((16, 24), None, None, 1, "table"),
        "embedding.tokens.weight": ((257, 24), 0, None, 1, "table"),
        "blocks.0.norm_1.weight": gain,
        "blocks.0.attention.q.weight": ((40, 24), 0, 4, 1, "map"),
        "blocks.0.attention.q.bias": ((40,), 0, 4, 1, "vector"),
        "blocks.0.attention.kv.weight": ((20, 24), 0, 1, 2, "map"),
        "blocks.0.attention.kv.bias": ((20,), 0, 1, 2, "vector"),
        "blocks.0.attention.out.weight": ((24, 40), 1, None, 1, "map"),
        "blocks.0.attention.out.bias": ((24,), None, None, 1, "vector"),
        "blocks.0.norm_2.weight": gain,
        "blocks.0.mlp.up.weight": ((2, 48, 24), 1, None, 1, "map"),
        "blocks.0.mlp.up.bias": ((2, 48), 1, None, 1, "vector"),
        "blocks.0.mlp.down.weight": ((24, 48), 1, None, 1, "map"),
        "blocks.0.mlp.down.bias": ((24,), None, None, 1, "vector"),
        "head.norm.weight": gain,
        "head.tokens.weight": ((257, 24), 0, None, 1, "table"),
        "head.bias": ((257,), 0, None, 1, "vector"),
    }
    with_two = canonical(replace(model, n_kv_heads=2))["blocks.0.attention.kv.weight"]
    assert [with_two.dim(tp) for tp in (1, 2, 4)] == [0, 0, None]


def test_kept_numbers_are_cut_as_far_as_they_can_be():
    by_heads, of_all, cut = Kept("keys", 80, ways=2), Kept("norms", 30, ways=1), Kept("hidden", 400)
    assert [kept_numbers([by_heads, of_all, cut], tp, micro_batch_size=3) for tp in (1, 2, 4)] == [510, 270, 170]
    assert kept_numbers([Kept("positions", 12, ways=1, once=True)], 4, micro_batch_size=3) == 4
