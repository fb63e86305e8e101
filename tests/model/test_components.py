"""Rotary, RMSNorm and SwiGLU against transformers' LLaMA, ALiBi against its MPT, with the same weights and gradients.

Both have no biases: ours start at zero and count for nothing here.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megagpt.config import ModelConfig
from megagpt.config.kernels import Kernels
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import part_of
from tests.hf.load import load_logical
from tests.tolerances import assert_close

transformers = pytest.importorskip("transformers")

SIZES = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 48, "seq_len": 16, "vocab_size": 211}
LLAMA = ModelConfig(
    **SIZES, position="rotary", rotary_base=500.0, norm="rmsnorm", activation="swiglu", tied_embeddings=False
)
MPT = ModelConfig(**{**SIZES, "d_ff": 128}, position="alibi", activation="gelu")


def llama() -> torch.nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=211,
        max_position_embeddings=16, rope_theta=500.0, rms_norm_eps=1e-5, attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def mpt() -> torch.nn.Module:
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=16, vocab_size=211, no_bias=True)
    return transformers.MptForCausalLM(config).eval()


def by_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Rows of q, k and v, head by head."""
    return torch.stack([x.unflatten(0, (4, -1)) for x in (q, k, v)], dim=1).flatten(0, 2)


def from_llama(t: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {
        "embedding.tokens.weight": t["model.embed_tokens.weight"],
        "head.norm.weight": t["model.norm.weight"],
        "head.tokens.weight": t["lm_head.weight"],
    }
    for i in range(2):
        a, b = f"model.layers.{i}", f"blocks.{i}"
        ours[f"{b}.norm_1.weight"] = t[f"{a}.input_layernorm.weight"]
        ours[f"{b}.norm_2.weight"] = t[f"{a}.post_attention_layernorm.weight"]
        ours[f"{b}.attention.qkv.weight"] = by_head(*(t[f"{a}.self_attn.{x}_proj.weight"] for x in "qkv"))
        ours[f"{b}.attention.out.weight"] = t[f"{a}.self_attn.o_proj.weight"]
        ours[f"{b}.mlp.up.weight"] = torch.stack([t[f"{a}.mlp.gate_proj.weight"], t[f"{a}.mlp.up_proj.weight"]])
        ours[f"{b}.mlp.down.weight"] = t[f"{a}.mlp.down_proj.weight"]
    return ours


def from_mpt(t: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {
        "embedding.tokens.weight": t["transformer.wte.weight"],
        "head.norm.weight": t["transformer.norm_f.weight"],
    }
    for i in range(2):
        a, b = f"transformer.blocks.{i}", f"blocks.{i}"
        ours[f"{b}.norm_1.weight"] = t[f"{a}.norm_1.weight"]
        ours[f"{b}.norm_2.weight"] = t[f"{a}.norm_2.weight"]
        ours[f"{b}.attention.qkv.weight"] = by_head(*t[f"{a}.attn.Wqkv.weight"].chunk(3))
        ours[f"{b}.attention.out.weight"] = t[f"{a}.attn.out_proj.weight"]
        ours[f"{b}.mlp.up.weight"] = t[f"{a}.ffn.up_proj.weight"]
        ours[f"{b}.mlp.down.weight"] = t[f"{a}.ffn.down_proj.weight"]
    return ours


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize(
    ("config", "build", "convert"), [(LLAMA, llama, from_llama), (MPT, mpt, from_mpt)], ids=["llama", "mpt"]
)
def test_logits_loss_and_gradients_are_theirs(config, build, convert, kernels):
    theirs = build()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1 + (parameter.dim() == 1))
    ours = GPT(config, SINGLE, kernels=Kernels.parse(kernels))
    zeros = {n: torch.zeros(part_of(p).shape) for n, p in ours.named_parameters() if n.endswith("bias")}
    load_logical(ours.named_parameters(), convert(dict(theirs.named_parameters())) | zeros)
    tokens_BT = torch.randint(0, 211, (3, 12))
    labels_BT = torch.randint(0, 211, (3, 12))

    expected = theirs(tokens_BT).logits
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), labels_BT.flatten())
    expected_loss.backward()
    assert_close(ours(tokens_BT)[..., :211], expected, "logits")
    loss = ours(tokens_BT, labels_BT=labels_BT)
    loss.backward()
    assert_close(loss, expected_loss, "loss")

    wanted = convert({n: p.grad for n, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        if not name.endswith("bias"):
            assert_close(part_of(parameter).unpadded(parameter.grad), wanted[name], f"gradient of {name}")
