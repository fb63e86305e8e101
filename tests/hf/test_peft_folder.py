"""Folders of peft beside our adapters, of every architecture: what they add is added by hand, and by peft itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megagpt.checkpoint.adapters import Adapters
from megagpt.config import LoraConfig, ModelConfig
from megagpt.config.lora import TARGETS
from megagpt.errors import UserError
from megagpt.hf.export_folder import ALLOWED
from megagpt.hf.peft_folder import read_adapter_folder, write_adapter_folder
from megagpt.inventory.layers import canonical
from megagpt.inventory.lora import adapter
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import named_parameters
from tests.hf.hf_cases import CASES, Case, theirs
from tests.hf.load import from_hf, load_logical
from tests.tolerances import assert_close

T = 11
# Their linear modules of a block, written out by hand: suffixes as peft takes them.
THEIRS = {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "openai-gpt": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    "gpt_neox": ("query_key_value", "attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"),
    "bloom": ("query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
    "mpt": ("Wqkv", "out_proj", "up_proj", "down_proj"),
    "llama": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "mistral": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "falcon": ("query_key_value", "self_attention.dense", "dense_h_to_4h", "dense_4h_to_h"),
    "gpt_bigcode": ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
}


def adapters_of(model: ModelConfig, lora: LoraConfig) -> Adapters:
    """Adapters of large random numbers, in every block."""
    assert lora.rank is not None
    generator, a, b = torch.Generator().manual_seed(1), {}, {}
    may = tuple(f".{module}.weight" for target in lora.targets for module in TARGETS[target])
    for name, weight in canonical(model).items():
        if name.endswith(may):
            first, second = adapter(weight, lora.rank).values()
            a[name] = 0.3 * torch.randn(first.shape, generator=generator)
            b[name] = 0.3 * torch.randn(second.shape, generator=generator)
    return Adapters(lora.scale, a, b)


def tokens_of(case: Case) -> Tensor:
    return torch.randint(0, case.config.vocab, (2, T), generator=torch.Generator().manual_seed(2))


def assert_same_logits(ours: Tensor, expected: Tensor) -> None:
    """To what an export allows: large factors blow round-off up; rows in another place differ by a tenth."""
    assert (ours - expected).abs().max() <= ALLOWED * expected.abs().max()


@torch.no_grad()
def our_logits(case: Case, state: dict[str, Tensor], adapters: Adapters) -> Tensor:
    model = GPT(case.config, SINGLE).eval()
    load_logical(model.named_parameters(), from_hf(state, case.config, case.architecture))
    adapters.merge_into(named_parameters(model))
    return model(tokens_of(case))


@torch.no_grad()
def added_by_hand(model: Any, folder: Path) -> Any:
    """W + alpha / r B A, as the two files say it, with no code of ours."""
    keys, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        a, b = tensors[name], tensors[name.replace("lora_A", "lora_B")]
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        alpha = next((v for k, v in keys["alpha_pattern"].items() if module.endswith(k)), keys["lora_alpha"])
        added = b @ a * (alpha / (a.shape[0] ** 0.5 if keys["use_rslora"] else a.shape[0]))
        model.get_submodule(module).weight.add_(added.T if keys["fan_in_fan_out"] else added)
    return model


@pytest.mark.parametrize(
    ("name", "rslora"), [*((name, False) for name in CASES), ("llama", True), ("falcon multi-query", True)]
)
def test_what_is_written_adds_the_same_there_and_comes_back(name, rslora, tmp_path):
    torch.manual_seed(0)
    case, lora = CASES[name], LoraConfig(rank=3, alpha=6.0, rslora=rslora)
    adapters, model = adapters_of(case.config, lora), theirs(case)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    write_adapter_folder(tmp_path, lora, adapters, case.config, case.architecture)
    ours = our_logits(case, state, adapters)
    with torch.no_grad():
        plain = model(tokens_of(case)).logits
        assert_same_logits(ours, added_by_hand(model, tmp_path)(tokens_of(case)).logits)
    assert (ours - plain).abs().max() > 0.05 * plain.abs().max()  # else nothing is shown
    again, back = read_adapter_folder(tmp_path, case.config)
    assert (again.rank, again.scale, again.targets) == (3, pytest.approx(lora.scale), lora.targets)
    for weight in adapters.a:
        assert_close(back.a[weight], adapters.a[weight], weight)
        assert_close(back.b[weight], adapters.b[weight], weight)


@pytest.mark.parametrize("name", CASES)
def test_peft_loads_what_is_written_and_computes_the_same(name, tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    case, lora = CASES[name], LoraConfig(rank=3, alpha=6.0, rslora=True)
    adapters, model = adapters_of(case.config, lora), theirs(case)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    write_adapter_folder(tmp_path, lora, adapters, case.config, case.architecture)
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(model, tmp_path).eval()(tokens_of(case)).logits
    assert_same_logits(our_logits(case, state, adapters), found)


@pytest.mark.parametrize("name", CASES)
def test_what_peft_writes_is_read(name, tmp_path):
    """Modules in part, each with an A, a rank and an alpha of its own."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    case = CASES[name]
    names, model = THEIRS[case.architecture], theirs(case)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    chosen = [*names[:1], *names[2:4]]
    settings = {"rank_pattern": {names[0]: 4}, "alpha_pattern": {names[2]: 9}, "init_lora_weights": False}
    made = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=3, target_modules=chosen, **settings)).eval()
    made.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = made(tokens_of(case)).logits
    lora, adapters = read_adapter_folder(tmp_path, case.config)
    assert_same_logits(our_logits(case, state, adapters), expected)
    assert lora.rank is not None and lora.rank >= 4


def written_by_hand(folder: Path, ranks: dict[str, int], **keys: Any) -> None:
    """A folder for a small LLaMA: q, k, v, o of 32 x 32."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "alpha_pattern": {}, **keys}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator, tensors = torch.Generator().manual_seed(3), {}
    for module, rank in ranks.items():
        stem = f"base_model.model.model.layers.1.self_attn.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, 32, generator=generator)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(32, rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_different_a_of_what_we_keep_in_one_become_blocks(tmp_path):
    """q and v of one block: A one below the other; the rest of all blocks begins as in a new run, and adds nothing."""
    model = CASES["llama biased"].config
    written_by_hand(tmp_path, {"q_proj": 2, "v_proj": 3}, lora_dropout=0.1)
    lora, adapters = read_adapter_folder(tmp_path, model)
    assert (lora.rank, lora.targets, lora.dropout) == (5, ("qkv",), 0.1)
    assert lora.scale == pytest.approx(2.0)
    name = "blocks.1.attention.qkv.weight"
    theirs_ = load_file(tmp_path / "adapter_model.safetensors")
    a = [theirs_[f"base_model.model.model.layers.1.self_attn.{m}.lora_A.weight"] for m in ("q_proj", "v_proj")]
    assert torch.equal(adapters.a[name], torch.cat(a))
    by_map = adapters.b[name].unflatten(0, (model.n_heads, 3, -1))
    assert not by_map[:, 0, :, 2:].any() and not by_map[:, 1].any() and not by_map[:, 2, :, :2].any()
    other = "blocks.0.attention.qkv.weight"
    assert adapters.a[other].any() and not adapters.b[other].any()


BAD = {
    "another kind": ({"peft_type": "IA3"}, "peft_type='IA3', wanted LORA"),
    "DoRA": ({"use_dora": True}, "use_dora=True, with which more than W + scale B A is computed"),
    "modules trained whole": ({"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
    "biases": ({"bias": "all"}, "biases were trained too"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "which changed the base's weights too"),
    "no rank": ({"r": "8"}, "r='8', wanted a number above 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_said_by_a_and_b_is_refused(name, tmp_path):
    keys, message = BAD[name]
    written_by_hand(tmp_path, {"q_proj": 2}, **keys)
    with pytest.raises(UserError) as caught:
        read_adapter_folder(tmp_path, CASES["llama biased"].config)
    assert message in str(caught.value)


def test_adapters_of_another_model_are_refused(tmp_path):
    written_by_hand(tmp_path, {"q_proj": 2})
    with pytest.raises(
        UserError, match=r"has adapters of .*q_proj; the base, a gpt2 of 2 layers, has no such matrices"
    ):
        read_adapter_folder(tmp_path, CASES["gpt2"].config)
    with pytest.raises(UserError, match=r"is for a matrix of \(32, 32\), the base has one of \(24, 32\)"):
        read_adapter_folder(tmp_path, CASES["llama"].config)
