"""Attention against a plain one in float64, written head by head from the formulas; all implementations, all layouts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torchs_flex_attention

from megagpt.config import ModelConfig
from megagpt.config.pattern import Pattern
from megagpt.kernels import ATTENTION_CHOICES, AUTO, Kernels, attention_lacks
from megagpt.model.attention import Attention
from megagpt.model.gpt import GPT
from megagpt.model.init import Init
from megagpt.model.masks import Masks
from megagpt.model.relative import TransformerXL
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.kv_linear import HeadsLinear
from megagpt.parallel.local import run_ranks
from megagpt.parity import Layout, compare, parity_config, require_lively, run_layout
from tests.logical import assemble
from tests.model.test_gpt import loss_and_gradients, tensor_parallel
from tests.model.test_masks import by_loops
from tests.tolerances import assert_close, assert_equal

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
    return replace(CONFIG, position=position, **POSITIONS[name], **fields)  # type: ignore[arg-type]


def attention(config: ModelConfig, kernels: Kernels = AUTO, layer: int = 0) -> Attention:
    """In float64, with biases that count."""
    module = Attention(config, layer, SINGLE, Init(config, 3), "attention", kernels).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def plain(module: Attention, config: ModelConfig, x_BTD: Tensor, layer: int = 0) -> Tensor:
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
    if text.startswith("bigbird"):  # proven in test_masks.py
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
    distance = torch.arange(n).unsqueeze(1) - torch.arange(n)
    if config.position == "alibi":
        return -press_slopes(config.n_heads)[h] * distance
    if config.position == "t5":
        assert module.buckets is not None
        exact, buckets, far = config.t5_buckets // 2, config.t5_buckets, config.t5_max_distance

        def bucket(d: int) -> int:
            if d < exact:
                return d
            return min(buckets - 1, exact + int(math.log(d / exact) / math.log(far / exact) * (buckets - exact)))

        rows = [[bucket(max(int(d), 0)) for d in row] for row in distance]
        return module.buckets.weight[torch.tensor(rows), h]
    if config.position == "transformer_xl":  # Dai et al. 2019, section 3.3: the three terms beside q · k
        relative = module.relative
        assert relative is not None
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


def check_all_implementations(config: ModelConfig, monkeypatch: pytest.MonkeyPatch, layer: int = 0) -> None:
    """Each that has what the configuration needs, against the plain one: output and every gradient."""
    # torch refuses training with FlexAttention on the CPU, whose gradients its plain implementation has all the same.
    monkeypatch.setattr(torchs_flex_attention, "_validate_device", lambda *_: None)
    x_BTD = torch.randn(2, T, config.d_model, dtype=torch.float64, requires_grad=True)
    dy_BTD = torch.randn(2, T, config.d_model, dtype=torch.float64)
    module = attention(config, layer=layer)
    expected = outputs_and_gradients(plain(module, config, x_BTD, layer), module, x_BTD, dy_BTD)
    for choice in ATTENTION_CHOICES:
        if attention_lacks(choice, config.position, config.dropout_attention):
            continue
        module = attention(config, Kernels.parse(f"auto,attention={choice}"), layer)
        y_BTD = module(x_BTD, torch.arange(2))
        for name, value in outputs_and_gradients(y_BTD, module, x_BTD, dy_BTD).items():
            assert_close(value, expected[name], f"{choice}: {name}")


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("text", PATTERNS)
def test_every_pattern_is_the_same_in_every_implementation(text, n_kv_heads, monkeypatch):
    check_all_implementations(replace(CONFIG, attention=(text,), n_kv_heads=n_kv_heads), monkeypatch)


@pytest.mark.parametrize("n_kv_heads", [2, 4])
@pytest.mark.parametrize("name", POSITIONS)
def test_every_position_is_the_published_one(name, n_kv_heads, monkeypatch):
    config = positioned(name, n_kv_heads=n_kv_heads, bias_attention=n_kv_heads == 4)
    check_all_implementations(config, monkeypatch)
