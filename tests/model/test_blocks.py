"""Every order of norms, attention and MLP against a plain GPT in float64, written here from the formulas.

Shapes: B batch, T time, D model, H heads, K head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagpt.config import ModelConfig
from megagpt.inventory import layers as inventory
from megagpt.model.block import Block
from megagpt.model.gpt import GPT
from megagpt.model.stream import Stream
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.parameter import Declared, part_of
from megagpt.processes.local import run_ranks

BASE = ModelConfig(n_layers=2, d_model=24, n_heads=3, d_ff=40, seq_len=10, vocab_size=37, activation="gelu")
NO_BIASES = {"bias_attention": False, "bias_mlp": False, "bias_norm": False}
VARIANTS = {
    "GPT-2": {},
    "GPT-1": {"norm_position": "post", "final_norm": False, "init": "normal"},
    "GPT-1, a final norm": {"norm_position": "post"},
    "no final norm": {"final_norm": False},
    "PaLM": {"block": "parallel", **NO_BIASES, "init": "fan_in", "logit_scale": 24**-0.5},
    "GPT-NeoX": {"block": "parallel_two_norms", "init": "small", "tied_embeddings": False},
    "GPT-J": {"block": "parallel", "bias_attention": False, "bias_head": True, "tied_embeddings": False},
    "BLOOM": {"embedding_norm": True, "position": "none"},
    "no biases, sinusoids": {**NO_BIASES, "position": "sinusoidal"},
    "RMSNorm after": {"norm": "rmsnorm", "norm_position": "post", "bias_mlp": False},
}


@pytest.mark.parametrize("residual_dropout", [0.0, 1e-9], ids=["fused norms", "plain norms"])
@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients(name, residual_dropout):
    """A dropout of 1e-9 drops nothing, but takes the way that dropout takes."""
    config = replace(BASE, **VARIANTS[name], dropout_residual=residual_dropout)
    model = GPT(config, SINGLE).double()
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases away from 1 and 0
            logical = part_of(parameter).unpadded(parameter)
            logical += 0.3 * torch.randn_like(logical)
    tokens_BT = torch.randint(37, (2, 7))
    weights = {n: part_of(p).unpadded(p.detach()).clone().requires_grad_() for n, p in model.named_parameters()}
    expected = plain_gpt(weights, config, tokens_BT)
    logits = model(tokens_BT)[..., :37]
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    pull = torch.randn_like(expected)
    logits.backward(pull)
    expected.backward(pull)
    for n, p in model.named_parameters():
        torch.testing.assert_close(part_of(p).unpadded(p.grad), weights[n].grad, rtol=1e-9, atol=1e-9, msg=n)


def test_biases_are_there_or_not():
    def biases(**changes) -> set[str]:
        names = [name for name, _ in GPT(replace(BASE, n_layers=1, **changes), SINGLE).named_parameters()]
        return {name.removeprefix("blocks.0.") for name in names if name.endswith("bias")}

    attention = {"attention.qkv.bias", "attention.out.bias"}
    mlp = {"mlp.up.bias", "mlp.down.bias"}
    norms = {"norm_1.bias", "norm_2.bias", "head.norm.bias"}
    assert biases() == attention | mlp | norms
    assert biases(**NO_BIASES) == set()
    assert biases(bias_attention=False) == mlp | norms
    assert biases(bias_mlp=False, bias_head=True) == attention | norms | {"head.bias"}
    assert biases(norm="rmsnorm") == attention | mlp
    assert biases(block="parallel", embedding_norm=True) == (
        attention | mlp | norms - {"norm_2.bias"} | {"embedding.norm.bias"}
    )


STDS = {  # of embedding, mlp.up, mlp.down, by the papers, for L = 4, D = 256, F = 512
    "gpt2": (0.02, 0.02, 0.02 / math.sqrt(8)),
    "normal": (0.02, 0.02, 0.02),
    "small": (math.sqrt(2 / 1280), math.sqrt(2 / 1280), 2 / (4 * 16)),
    "fan_in": (1.0, 1 / 16, 1 / math.sqrt(512)),
}


@pytest.mark.parametrize("init", STDS)
def test_initial_weights(init):
    config = ModelConfig(n_layers=4, d_model=256, n_heads=4, d_ff=512, seq_len=8, vocab_size=512, init=init)
    model = GPT(config, SINGLE)
    block = model.blocks[1]
    drawn = (model.embedding.tokens.weight, block.mlp.up.weight, block.mlp.down.weight)
    for weight, std in zip(drawn, STDS[init], strict=True):
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.02)  # 2^17 draws: 0.2 % is one standard error
    assert float(block.attention.qkv.weight.detach().std()) == pytest.approx(STDS[init][1], rel=0.02)


def plain_gpt(w: dict[str, Tensor], config: ModelConfig, tokens_BT: Tensor) -> Tensor:
    n_tokens = tokens_BT.shape[1]
    x = w["embedding.tokens.weight"][tokens_BT]
    if config.position == "learned":
        x = x + w["embedding.positions"][:n_tokens]
    if config.position == "sinusoidal":
        x = x + vaswani(n_tokens, config.d_model)
    if config.embedding_norm:
        x = norm(w, "embedding.norm", x, config)
    for i in range(config.n_layers):
        x = plain_block(w, f"blocks.{i}", x, config)
    if config.final_norm:
        x = norm(w, "head.norm", x, config)
    logits = x @ w.get("head.tokens.weight", w["embedding.tokens.weight"]).T * config.logit_scale
    return logits + w["head.bias"] if config.bias_head else logits


def plain_block(w: dict[str, Tensor], at: str, x: Tensor, config: ModelConfig) -> Tensor:
    def attend(h: Tensor) -> Tensor:
        return attention(w, at, h, config)

    def feed(h: Tensor) -> Tensor:
        hidden = F.gelu(linear(w, f"{at}.mlp.up", h))
        return linear(w, f"{at}.mlp.down", hidden)

    if config.norm_position == "post":
        x = norm(w, f"{at}.norm_1", x + attend(x), config)
        return norm(w, f"{at}.norm_2", x + feed(x), config)
    h = norm(w, f"{at}.norm_1", x, config)
    if config.block == "parallel":
        return x + attend(h) + feed(h)
    if config.block == "parallel_two_norms":
        return x + attend(h) + feed(norm(w, f"{at}.norm_2", x, config))
    x = x + attend(h)
    return x + feed(norm(w, f"{at}.norm_2", x, config))


def attention(w: dict[str, Tensor], at: str, h: Tensor, config: ModelConfig) -> Tensor:
    q, k, v = linear(w, f"{at}.attention.qkv", h).unflatten(-1, (config.n_heads, 3, -1)).permute(3, 0, 2, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return linear(w, f"{at}.attention.out", y.transpose(1, 2).flatten(2))


def linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def norm(w: dict[str, Tensor], name: str, x: Tensor, config: ModelConfig) -> Tensor:
    if config.norm == "rmsnorm":
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + config.norm_eps) * w[f"{name}.weight"]
    return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w.get(f"{name}.bias"), config.norm_eps)


def vaswani(n_tokens: int, d_model: int) -> Tensor:
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i + 1) = cos of the same."""
    table = torch.zeros(n_tokens, d_model, dtype=torch.float64)
    for position in range(n_tokens):
        for j in range(d_model):
            angle = position / 10000 ** (2 * (j // 2) / d_model)
            table[position, j] = math.sin(angle) if j % 2 == 0 else math.cos(angle)
    return table


PALM = replace(
    BASE, **VARIANTS["PaLM"], n_heads=4, n_kv_heads=1, d_head=8, position="rotary", activation="swiglu", vocab_size=64
)


def test_a_block_in_one_sum_is_the_same_on_two_ranks():
    whole = block_on_rank()
    ranks = run_ranks(block_on_rank, 2)
    for rank in ranks:
        assert rank.n_all_reduces == 3, "one forward, one backward, and the gradient of the keys' and values' weight"
        torch.testing.assert_close(rank.y, whole.y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rank.dx, whole.dx, rtol=1e-12, atol=1e-12)
    for name, gradient in whole.gradients.items():
        parts = [rank.gradients[name] for rank in ranks]
        dim = next((d for d, n in enumerate(gradient.shape) if parts[0].shape[d] < n), None)
        found = parts[0] if dim is None else torch.cat(parts, dim)
        torch.testing.assert_close(found, gradient, rtol=1e-11, atol=1e-11, msg=name)


@dataclass(frozen=True)
class OneBlock:
    y: Tensor
    dx: Tensor
    gradients: dict[str, Tensor]
    n_all_reduces: int


def block_on_rank() -> OneBlock:
    size = dist.get_world_size() if dist.is_initialized() else 1
    axis = Axis(dist.group.WORLD, dist.get_rank(), size) if size > 1 else SINGLE
    declared = Declared("blocks.0", inventory.block(PALM, 0).parameters, seed=3)
    block = Block(PALM, 0, axis, declared).double()
    x = torch.randn(2, 6, PALM.d_model, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    calls: list[None] = []
    with pytest.MonkeyPatch.context() as patch:
        original = dist.all_reduce
        patch.setattr(dist, "all_reduce", lambda *args, **kwargs: (calls.append(None), original(*args, **kwargs))[1])
        y = block(Stream(x, torch.zeros(2, dtype=torch.int64))).x
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y))
    assert x.grad is not None
    gradients = {name: parameter.grad for name, parameter in block.named_parameters() if parameter.grad is not None}
    return OneBlock(y.detach(), x.grad, gradients, len(calls))
