"""Attention against a plain one in float64, written head by head from the papers; all implementations and layouts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torchs_flex_attention

from megagpt.config import ModelConfig
from megagpt.config.kernels import ATTENTION_CHOICES, AUTO, Kernels
from megagpt.config.pattern import Pattern
from megagpt.inventory import layers as inventory
from megagpt.inventory.attention import attention_lacks, attention_runs
from megagpt.model.attention import blocks
from megagpt.model.attention.attention import Attention
from megagpt.model.attention.masks import Masks
from megagpt.model.gpt import GPT
from megagpt.model.ops_used import attention_status, ops_used
from megagpt.model.stream import Stream
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.parameter import Declared, part_of
from megagpt.processes.local import run_ranks
from tests.logical import assemble
from tests.model.attention.test_patterns import by_loops
from tests.model.test_gpt import loss_and_gradients, tensor_parallel
from tests.parity.walk import Layout, compare, parity_config, run_layout
from tests.tolerances import assert_close, assert_equal

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

CONFIG = ModelConfig(
    n_layers=2, d_model=20, n_heads=4, d_head=6, seq_len=32, vocab_size=7, position="none", init_std=0.5
)
T = 29
BIGBIRD = "bigbird:3:2:1:2"
PATTERNS = ["dense", "window:5", "strided:4", BIGBIRD]
POSITIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "rotary": {"rotary_base": 300.0},
    "GPT-J's rotary": {"rotary_fraction": 0.67, "rotary_interleaved": True},
    "rotary, twice as far": {"rotary_factor": 2.0},
    "rotary, NTK": {"rotary_factor": 3.0, "rotary_scaling": "ntk"},
    "alibi": {},
    "transformer_xl": {},
    "t5": {"t5_buckets": 6, "t5_max_distance": 20},
}


def positioned(name: str, **fields: Any) -> ModelConfig:
    position = "rotary" if "rotary" in name else name
    return replace(CONFIG, position=position, **POSITIONS[name], **fields)


def declared(config: ModelConfig) -> Declared:
    return Declared("attention", inventory.attention(config, 1), seed=3)


def attention(config: ModelConfig, kernels: Kernels = AUTO, layer: int = 1) -> Attention:
    """In float64, with biases that count."""
    module = Attention(config, layer, SINGLE, declared(config), kernels).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def plain(module: Attention, config: ModelConfig, x_BTD: Tensor, layer: int = 1) -> Tensor:
    """softmax(q kᵀ / √K + bias) v, head by head, from the papers."""
    H, G, K = config.n_heads, config.kv_heads, config.head_width
    parameters = dict(module.named_parameters())

    def projected(name: str, n_packed: int) -> list[Tensor]:
        y = x_BTD @ parameters[f"{name}.weight"].t() + parameters.get(f"{name}.bias", 0.0)
        return [*y.unflatten(-1, (-1, n_packed, K)).unbind(-2)]  # each (B, T, heads, K)

    if G == H:
        q, k, v = projected("qkv", 3)
    else:
        (q,), (k, v) = projected("q", 1), projected("kv", 2)
    n = x_BTD.shape[1]
    text = str(config.pattern(layer))
    if text.startswith("bigbird"):  # proven in test_patterns.py
        allowed = Masks(Pattern.parse(text), layer, config.seq_len).dense(n, torch.device("cpu"))[0, 0]
    else:
        allowed = by_loops(text, n)
    heads = []
    for h in range(H):
        q_h, k_h, v_h = q[:, :, h], k[:, :, h // (H // G)], v[:, :, h // (H // G)]
        if config.position == "rotary":
            q_h, k_h = turned(q_h, config), turned(k_h, config)
        scores = q_h @ k_h.transpose(1, 2) / math.sqrt(K) + bias_of_scores(module, config, q_h, k_h, h, n)
        heads.append(scores.masked_fill(~allowed, -math.inf).softmax(-1) @ v_h)
    return torch.cat(heads, -1) @ parameters["out.weight"].t() + parameters.get("out.bias", 0.0)


def turned(x_BTK: Tensor, config: ModelConfig) -> Tensor:
    """Su et al. 2021, section 3.4.2, as complex numbers."""
    d = int(config.head_width * config.rotary_fraction)
    base, factor = config.rotary_base, config.rotary_factor
    far = factor if config.rotary_scaling == "linear" else 1.0
    if config.rotary_scaling == "ntk":
        base = base * factor ** (d / (d - 2))
    times = [t / far for t in range(x_BTK.shape[1])]
    angles = torch.tensor([[t * base ** (-2 * i / d) for i in range(d // 2)] for t in times], dtype=torch.float64)
    first, rest = x_BTK[..., :d], x_BTK[..., d:]
    if config.rotary_interleaved:
        z = torch.complex(first[..., ::2], first[..., 1::2]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((torch.view_as_real(z).flatten(-2), rest), -1)
    z = torch.complex(*first.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag, rest), -1)


def bias_of_scores(module: Attention, config: ModelConfig, q: Tensor, k: Tensor, h: int, n: int) -> Tensor:
    distance = torch.arange(n).unsqueeze(1) - torch.arange(n)  # of query and key
    if config.position == "alibi":
        return -press_slopes(config.n_heads)[h] * distance.double()
    if config.position == "t5":
        exact, buckets, far = config.t5_buckets // 2, config.t5_buckets, config.t5_max_distance

        def bucket(d: int) -> int:
            if d < exact:
                return d
            return min(buckets - 1, exact + int(math.log(d / exact) / math.log(far / exact) * (buckets - exact)))

        rows = [[bucket(max(int(d), 0)) for d in row] for row in distance]
        return module.get_parameter("buckets.weight")[torch.tensor(rows), h]
    if config.position == "transformer_xl":  # Dai et al. 2019, section 3.3: the three terms beside q · k
        relative = module.get_submodule("relative")
        D, K = config.d_model, config.head_width
        angles = [[d / 10000 ** (2 * (i // 2) / D) for i in range(D)] for d in range(n)]
        waves = [[math.cos(a) if i % 2 else math.sin(a) for i, a in enumerate(row)] for row in angles]
        r_TTK = torch.tensor(waves, dtype=torch.float64)[distance.clamp(min=0)] @ relative.weight[h * K :][:K].t()
        u, v = relative.content_bias[h], relative.position_bias[h]
        return ((k @ u).unsqueeze(1) + torch.einsum("btk,tsk->bts", q + v, r_TTK)) / math.sqrt(K)
    return torch.zeros(n, n, dtype=torch.float64)


def press_slopes(n: int) -> list[float]:
    """Press et al. 2022, section 3; for other numbers of heads as their code fills up."""
    if n & (n - 1) == 0:
        return [2 ** (-8 * (i + 1) / n) for i in range(n)]
    below = 2 ** int(math.log2(n))
    return press_slopes(below) + press_slopes(2 * below)[::2][: n - below]


def outputs_and_gradients(y: Tensor, module: Attention, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(y, [x, *parameters], dy)
    return {"y": y, **{f"gradient of {n}": g for n, g in zip(("x", *names), grads, strict=True)}}


def check_all_implementations(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch, *, flex: bool = True, dtype: torch.dtype = torch.float64
) -> None:
    """Each that has what the configuration needs, against the plain one: output and every gradient.

    flex: it too, which torch traces for a second or two each time. dtype: whose tolerance holds.
    """
    # torch refuses training with FlexAttention on the CPU, whose gradients its plain implementation has all the same.
    monkeypatch.setattr(torchs_flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(blocks, "QUERIES", 8)
    layer = 1
    x_BTD = torch.randn(2, T, config.d_model, dtype=torch.float64, requires_grad=True)
    dy_BTD = torch.randn(2, T, config.d_model, dtype=torch.float64)
    module = attention(config, layer=layer)
    expected = outputs_and_gradients(plain(module, config, x_BTD, layer), module, x_BTD, dy_BTD)
    for choice in ATTENTION_CHOICES:
        if attention_lacks(choice, config.position, config.dropout_attention) or (choice == "flex" and not flex):
            continue
        module = attention(config, Kernels.parse(f"auto,attention={choice}"), layer)
        y_BTD = module(Stream(x_BTD, torch.arange(2)))
        for name, value in outputs_and_gradients(y_BTD, module, x_BTD, dy_BTD).items():
            assert_close(value, expected[name], f"{choice}: {name}", dtype)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("text", PATTERNS)
def test_every_pattern_is_the_same_in_every_implementation(text, n_kv_heads, monkeypatch):
    config = replace(CONFIG, attention=("dense", text), n_kv_heads=n_kv_heads)
    check_all_implementations(config, monkeypatch, flex=n_kv_heads == 2)


@pytest.mark.parametrize("n_kv_heads", [2, 4])
@pytest.mark.parametrize("name", POSITIONS)
def test_every_position_is_the_published_one(name, n_kv_heads, monkeypatch):
    config = positioned(name, n_kv_heads=n_kv_heads, bias_attention=n_kv_heads == 4)
    check_all_implementations(config, monkeypatch, flex=name == "alibi" and n_kv_heads == 2)


@pytest.mark.parametrize("first_head", [0, 4])
@pytest.mark.parametrize("text", PATTERNS)
def test_blocks_drop_what_the_steps_drop(text, first_head, monkeypatch):
    monkeypatch.setattr(blocks, "QUERIES", 8)
    config = replace(CONFIG, attention=(text,), dropout_attention=0.3, n_kv_heads=2)
    x_BTD, dy_BTD = (torch.randn(2, T, config.d_model, dtype=torch.float64, requires_grad=True) for _ in "xy")
    found = []
    for choice in ("softmax", "blocks"):
        module = attention(config, Kernels.parse(f"auto,attention={choice}"))
        module.heads = range(first_head, first_head + 4)  # as a rank of the model axis has them
        found.append(outputs_and_gradients(module(Stream(x_BTD, torch.tensor([3, 9]))), module, x_BTD, dy_BTD))
    for name, value in found[1].items():
        assert_close(value, found[0][name], name, torch.float64)


def test_blocks_keep_nothing_as_large_as_the_scores():
    n, sizes = 1024, []
    config = replace(CONFIG, seq_len=n, dropout_attention=0.1)
    module = attention(config)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        module(Stream(torch.randn(1, n, config.d_model, dtype=torch.float64), torch.arange(1)))
    assert 0 < max(sizes) < n * n


@pytest.mark.parametrize("n_heads", [3, 5, 12])
def test_alibi_has_any_number_of_heads(n_heads, monkeypatch):
    config = positioned("alibi", n_heads=n_heads)
    check_all_implementations(config, monkeypatch, flex=False, dtype=torch.float32)  # the slopes' own


# Every position with every pattern and sort of sharing somewhere, dropout in places, and heads of their own width.
SHARED = {
    "grouped, rotary": positioned("GPT-J's rotary", n_kv_heads=2, bias_attention=False),
    "one key head, window": positioned("rotary", n_kv_heads=1, attention=("dense", "window:5"), dropout_residual=0.1),
    "Transformer-XL, BigBird": positioned("transformer_xl", attention=(BIGBIRD,), dropout_attention=0.1),
    "Transformer-XL, grouped": positioned("transformer_xl", n_kv_heads=2),
    "T5, strided, one key head": positioned(
        "t5", n_kv_heads=1, attention=("strided:4", "dense"), dropout_attention=0.1
    ),
    "ALiBi, 12 heads, grouped": positioned("alibi", n_heads=12, n_kv_heads=4, attention=("window:5",)),
}


def of_13_tokens() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, ids of the samples, labels: shorter than seq_len."""
    tokens_BT = torch.randint(0, CONFIG.vocab, (3, 14))
    return tokens_BT[:, :-1], torch.randint(0, 2**40, (3,)), tokens_BT[:, 1:]


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("name", SHARED)
def test_ranks_of_the_model_axis_compute_the_same(name, tp):
    """Also with more ranks than key heads, whose weights every rank then holds whole, with equal gradients."""
    config, inputs = SHARED[name], of_13_tokens()
    loss, logits_BTV, grads = loss_and_gradients(config, SINGLE, inputs, torch.float64)
    expected = assemble([grads])
    results = run_ranks(tensor_parallel, tp, config, inputs, torch.float64)
    for rank_loss, rank_logits_BTV, _ in results:
        assert_close(rank_loss, loss, "loss")
        assert_close(rank_logits_BTV, logits_BTV, "logits")
    found = assemble(r[2] for r in results)
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        assert_close(grad, expected[key], f"gradient of {key}")


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("tp", [2, 4])
def test_initial_weights_do_not_depend_on_the_layout(name, tp):
    config = SHARED[name]
    whole = dict(GPT(config, SINGLE, seed=5).named_parameters())
    ranks = [dict(GPT(config, Axis(group=None, rank=r, size=tp), seed=5).named_parameters()) for r in range(tp)]
    merged = assemble({n: (part_of(p), part_of(p).unpadded(p.detach())) for n, p in rank.items()} for rank in ranks)
    assert merged.keys() == whole.keys()
    for key, tensor in merged.items():
        assert_equal(tensor, part_of(whole[key]).unpadded(whole[key].detach()), key)


@pytest.mark.parametrize("name", SHARED)
def test_recompute_changes_no_bit(name):
    inputs = of_13_tokens()
    runs = [loss_and_gradients(SHARED[name], SINGLE, inputs, torch.float32, recompute=r) for r in (False, True)]
    assert_equal(runs[1][0], runs[0][0], "loss")
    for key, (_, grad) in runs[0][2].items():
        assert_equal(runs[1][2][key][1], grad, key)


@pytest.mark.parametrize("name", SHARED)
def test_a_token_sees_the_same_whatever_comes_later(name):
    """As generation relies on, at any length: tables and masks of all lengths begin alike."""
    model = GPT(SHARED[name], SINGLE).double().eval()
    tokens_BT = torch.randint(0, CONFIG.vocab, (2, CONFIG.seq_len))
    logits_BTV = model(tokens_BT)
    for length in (1, 2, 7, 31):
        assert_close(model(tokens_BT[:, :length]), logits_BTV[:, :length], f"{length} tokens")


@pytest.mark.parametrize("name", SHARED)
def test_kernels_change_nothing_but_round_off(name):
    # Weights as a run begins with: those of the other tests, 25 times as large, make a few times more of a round-off.
    inputs, config = of_13_tokens(), replace(SHARED[name], init_std=0.02)
    runs = [
        loss_and_gradients(config, SINGLE, inputs, torch.float32, kernels=Kernels.parse(text))
        for text in ("auto", "auto,attention=softmax", "reference")
    ]
    for loss, _, grads in runs[1:]:
        assert_close(loss, runs[0][0], "loss")
        for key, (_, grad) in grads.items():
            assert_close(grad, runs[0][2][key][1], key)


TRAINED = {
    "grouped, rotary": [Layout(tp=4, micro_batch_size=2), Layout(tp=2, dp=2, zero_stage=3, recompute=True)],
    "one key head, window": [Layout(tp=2, pp=2, zero_stage=1, micro_batch_size=1)],
    "Transformer-XL, BigBird": [Layout(tp=2, dp=2, zero_stage=3, micro_batch_size=2)],
    "T5, strided, one key head": [Layout(tp=2, dp=2, zero_stage=1, micro_batch_size=2)],
}


@pytest.mark.parametrize("name", TRAINED)
def test_layouts_train_the_same(name):
    """Clipped by the same norm, to the same weights: whole key weights count once, and ZeRO gathers what is used."""
    model = replace(SHARED[name], d_model=24, seq_len=24, vocab_size=211, init_std=0.02)
    config = parity_config(model)
    config = replace(config, train=replace(config.train, train_steps=4))
    reference = run_layout(config, Layout(micro_batch_size=8, kernels="reference"))
    assert min(reference.grad_norms) > config.optim.clip
    for layout in TRAINED[name]:
        difference = compare(run_layout(config, layout), reference, config)
        assert difference.ok, (layout, difference)


def test_what_an_implementation_lacks_is_an_error():
    for choice, fields in (
        ("sdpa", {"position": "alibi"}),
        ("flex", {"position": "t5"}),
        ("flex", {"dropout_attention": 0.1}),
    ):
        config = replace(CONFIG, **fields)
        with pytest.raises(ValueError, match=f"attention={choice} has no .*; use attention=auto"):
            Attention(config, 0, SINGLE, declared(config), Kernels.parse(f"auto,attention={choice}"))


@pytest.mark.parametrize(
    ("fields", "kernels", "ops", "runs"),
    [
        ({}, "auto", [], "torch's scaled_dot_product_attention"),
        ({"attention": ("strided:4",), "n_kv_heads": 1}, "auto", [], "torch's scaled_dot_product_attention"),
        ({"position": "rotary"}, "auto,attention=flex", ["rotary"], "torch's FlexAttention"),
        (
            {"position": "rotary", "dropout_embedding": 0.1},
            "auto",
            ["dropout", "rotary"],
            "torch's scaled_dot_product_attention",
        ),
        ({"position": "alibi"}, "auto", ["softmax"], "softmax's steps"),
        ({"position": "alibi", "seq_len": 1024}, "auto", ["softmax"], "softmax's steps, by blocks of queries"),
        ({"dropout_attention": 0.1}, "auto", ["softmax", "dropout"], "softmax's steps"),
        ({"position": "t5", "seq_len": 1024}, "auto", ["softmax"], "softmax's steps"),
        (
            {"attention": ("dense", "window:256"), "seq_len": 1024},
            "auto",
            ["softmax"],
            "torch's scaled_dot_product_attention and softmax's steps, by blocks of queries",
        ),
        ({}, "cpu", ["softmax"], "softmax's steps"),
        ({}, "reference", ["softmax"], "softmax's steps"),
    ],
)
def test_what_runs_is_told(fields, kernels, ops, runs):
    config, chosen = replace(CONFIG, **fields), Kernels.parse(kernels)
    assert ops_used(config, chosen) == ["norm", "activation", "bias_dropout_add", "cross_entropy", *ops]
    assert attention_status(config, chosen).runs == runs


def test_dropout_is_off_in_evaluation_and_sdpa_serves():
    config = positioned("rotary", seq_len=1024)
    assert attention_runs("auto", config, 0, dropping=True) == "blocks"
    assert attention_runs("auto", config, 0, dropping=False) == "sdpa"
    assert attention_runs("auto", config, 0, dropping=True, n_tokens=511) == "softmax"
