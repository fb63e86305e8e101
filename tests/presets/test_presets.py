"""Every shipped preset parses, plans, and has the number of parameters that is published for it."""

from __future__ import annotations

import csv
import functools
import io
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console

from megagpt.cli import parse_run_config
from megagpt.config import ModelConfig, RunConfig
from megagpt.inventory.layers import layers
from megagpt.plan.plan import make_plan
from megagpt.plan.table import plan_table
from megagpt.presets import preset_names, preset_path
from megagpt.schedule import Schedule
from tools.models_page import read_header

FACTS = Path(__file__).parents[2].parent / "shared" / "facts" / "models.csv"

MODELS = [name for name in preset_names() if name != "tiny"]
# Row of ../shared/facts/models.csv (column "model") for each preset.
ROWS = {
    "gpt1": "GPT-1",
    "gpt2-small": "GPT-2 small",
    "gpt2-medium": "GPT-2 medium",
    "gpt2-large": "GPT-2 large",
    "gpt2-xl": "GPT-2 XL",
    "gpt3-small": "GPT-3 Small",
    "gpt3-medium": "GPT-3 Medium",
    "gpt3-large": "GPT-3 Large",
    "gpt3-xl": "GPT-3 XL",
    "gpt3-2.7b": "GPT-3 2.7B",
    "gpt3-6.7b": "GPT-3 6.7B",
    "gpt3-13b": "GPT-3 13B",
    "gpt3-175b": "GPT-3 175B",
    "jurassic-1-large": "J1-Large",
    "jurassic-1-jumbo": "J1-Jumbo",
    "megatron-8.3b": "Megatron-LM 8.3B",
    "mt-nlg-530b": "MT-NLG 530B",
    "gopher-44m": "Gopher 44M",
    "gopher-117m": "Gopher 117M",
    "gopher-417m": "Gopher 417M",
    "gopher-1.4b": "Gopher 1.4B",
    "gopher-7.1b": "Gopher 7.1B",
    "gopher-280b": "Gopher 280B",
    "chinchilla-70b": "Chinchilla 70B",
    "palm-8b": "PaLM 8B",
    "palm-62b": "PaLM 62B",
    "palm-540b": "PaLM 540B",
    "llama-7b": "LLaMA 7B",
    "llama-13b": "LLaMA 13B",
    "llama-33b": "LLaMA 33B",
    "llama-65b": "LLaMA 65B",
    "mosaic-gpt2-52m": "GPT-2 52M",
    "mosaic-gpt2-83m": "GPT-2 83M",
    "mosaic-gpt2-125m": "GPT-2 125M",
    "gpt-580m-alibi": "GPT-580M (ALiBi)",
}
PRINTED_WRONG = {("gpt3-xl", "heads"): 24}  # x 128 is not 2048; the preset tells
TOKENS = {  # of the whole run, as published; GPT-1 and GPT-2 never were, PaLM's smaller ones saw the same corpus once
    "gpt3": 300e9,
    "jurassic": 300e9,
    "megatron": 157e9,
    "mt-nlg": 270e9,
    "gopher": 300e9,
    "chinchilla": 1.4e12,
    "palm": 780e9,
    "llama-7b": 1.0e12,
    "llama-13b": 1.0e12,
    "llama-33b": 1.4e12,
    "llama-65b": 1.4e12,
}


@functools.cache
def load(name: str) -> RunConfig:
    return parse_run_config(["--preset", name])


def params(model: ModelConfig) -> int:
    return sum(layer.params for layer in layers(model))


def test_all_presets_are_held():
    assert sorted(ROWS) == sorted(MODELS)


@pytest.mark.parametrize("name", MODELS)
def test_parameters(name):
    """Of the layers as declared, which models are built from (tests/plan): as the preset says, and as published."""
    header = read_header(name)
    assert params(load(name).model) == header.n_params
    if name not in MOSAIC_STATED:  # whose card counts another shape, see below
        assert header.n_params == pytest.approx(number(header.stated), rel=0.02)


def number(text: str) -> float:
    """ "530B" as a number."""
    return float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]]


def transformers_model(name: str, model: ModelConfig) -> tuple[str, dict]:
    """(model class of transformers, keyword arguments of its configuration) for the same shape."""
    if name == "gpt1":
        sizes = {"n_layer": model.n_layers, "n_embd": model.d_model, "n_head": model.n_heads, "n_positions": 512}
        return "OpenAIGPT", {**sizes, "vocab_size": model.vocab}
    if name.startswith("llama"):
        return "Llama", {
            "num_hidden_layers": model.n_layers,
            "hidden_size": model.d_model,
            "num_attention_heads": model.n_heads,
            "intermediate_size": model.ff_width,
            "vocab_size": model.vocab,
        }
    sizes = {"n_layer": model.n_layers, "n_embd": model.d_model, "n_head": model.n_heads, "n_positions": model.seq_len}
    return "GPT2", {**sizes, "vocab_size": model.vocab}


@pytest.mark.parametrize("name", ["gpt1", "gpt2-small", "gpt3-small", "jurassic-1-large", "megatron-8.3b", "llama-7b"])
def test_transformers_counts_the_same(name):
    """One of each family: the others differ in sizes only, and their numbers are held to what was published."""
    transformers = pytest.importorskip("transformers")
    kind, arguments = transformers_model(name, load(name).model)
    with torch.device("meta"):
        head = "ForCausalLM" if kind == "Llama" else "LMHeadModel"
        theirs = getattr(transformers, kind + head)(getattr(transformers, kind + "Config")(**arguments))
    theirs.tie_weights()  # on the meta device the tie is not made by itself
    assert sum(p.numel() for p in theirs.parameters()) == read_header(name).n_params


@pytest.mark.parametrize("name", [name for name in MODELS if any(name.startswith(family) for family in TOKENS)])
def test_the_steps_are_the_published_tokens(name):
    expected = next(tokens for family, tokens in TOKENS.items() if name.startswith(family))
    assert Schedule(load(name)).total_tokens == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", [name for name in MODELS if read_header(name).layout])
def test_the_layout_of_a_preset_fits(name):
    flags = shlex.split(read_header(name).layout or "")
    at = flags.index("--world-size")
    config = parse_run_config(["--preset", name, *flags[:at], *flags[at + 2 :]])
    plan = make_plan(config, int(flags[at + 1]))
    assert max(stage.memory.total for stage in plan.stages) < 80 * 2**30
    assert plan.params == read_header(name).n_params
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(plan_table(config, plan))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert max(map(len, lines)) <= 100
    assert sum("emb +" in line or "+ head" in line for line in lines) == min(plan.pp, 2)


def test_tiny_is_the_default():
    assert load("tiny") == RunConfig()


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_names_its_source_and_can_be_cut(name):
    config = load(name)
    first_line, *rest = preset_path(name).read_text().splitlines()
    assert first_line.startswith("# ")
    assert rest[0].startswith("# ")
    if name != "tiny":
        header = read_header(name)
        assert header.source.endswith(".") and len(header.source) > 20
        assert header.layout is not None or header.n_params < 1e9
    assert config.model.n_layers >= 4  # pp 4
    assert config.optim.warmup_steps < config.train.train_steps


# What MosaicML's model card states, and the shape that has this count: that of the first models of the family.
# The files of the second and third (gpt2_85m.yaml, gpt2_114m.yaml) are in the history of mosaicml/composer, and
# the card gives their training tokens; the first is what the repository's scaling_laws_generator.py makes of the
# same loss. Counted as everywhere here (all parameters, tied matrix once, 1024 positions), cut to three digits.
MOSAIC_STATED = {
    "mosaic-gpt2-52m": (53.9e6, 0.1e6, ModelConfig(n_layers=6, d_model=576, n_heads=12, d_ff=2376)),
    "mosaic-gpt2-83m": (85.8e6, 0.1e6, ModelConfig(n_layers=8, d_model=720, n_heads=15, d_ff=2800)),
    "mosaic-gpt2-125m": (114e6, 1e6, ModelConfig(n_layers=9, d_model=816, n_heads=17, d_ff=3320)),
}


@pytest.mark.parametrize("name", MOSAIC_STATED)
def test_where_the_stated_mosaic_sizes_come_from(name):
    stated, digit, first_shape = MOSAIC_STATED[name]
    first_shape = ModelConfig(**{**vars(first_shape), "seq_len": 1024, "vocab_size": 50257})
    assert stated <= params(first_shape) < stated + digit  # the number of the card is that of the first shape …
    assert abs(read_header(name).n_params - stated) > 2e6  # … and not that of the shape beside it,
    name_millions = int(name.removesuffix("m").rsplit("-", 1)[1])
    assert math.ceil(read_header(name).n_params / 1e6) == name_millions  # whose count, rounded up, is the name


@pytest.mark.skipif(not FACTS.exists(), reason="../shared/facts/models.csv is not here")
@pytest.mark.parametrize("name", ROWS)
def test_the_table_of_facts_agrees(name):
    config = load(name)
    with FACTS.open(encoding="utf-8", newline="") as file:
        row = next(r for r in csv.DictReader(file) if r["model"] == ROWS[name])
    model, optim = config.model, config.optim
    for column, value in [
        ("layers", model.n_layers),
        ("d_model", model.d_model),
        ("heads", model.n_heads),
        ("d_head", model.head_width),
        ("d_ff", model.ff_width),
        ("ctx", model.seq_len),
        ("vocab", model.vocab),
    ]:
        printed = PRINTED_WRONG.get((name, column))
        assert int(row[column]) == (value if printed is None else printed), column
    computed = row["params_computed"] or row["params_stated"]
    n_params, exact = read_header(name).n_params / 1e6, bool(row["params_computed"])
    if name in MOSAIC_STATED:
        n_params, exact = MOSAIC_STATED[name][0] / 1e6, True
    assert millions(computed) == pytest.approx(n_params, rel=2e-3 if exact else 0.02)
    train = config.train
    for column, value, rel in [
        ("lr", optim.lr, 1e-9),
        ("lr_min", optim.lr * optim.min_lr_fraction, 1e-3),
        ("adam_beta1", optim.beta1, 1e-9),
        ("adam_beta2", optim.beta2, 1e-9),
        ("adam_eps", optim.eps, 1e-9),
        ("weight_decay", optim.weight_decay, 1e-9),
        ("grad_clip", optim.clip, 1e-9),
        ("batch_tokens", train.global_batch_size * model.seq_len, 0.05),
        ("tokens_trained", Schedule(config).total_tokens, 0.1 if name in MOSAIC_STATED else 0.06),
    ]:
        published = re.match(r"[\d.]+(e-?\d+)?", row[column])
        told_otherwise = ("k", "k)", "k^-0.8", "epochs of BooksCorpus")  # functions of the step, and a corpus
        if published and not row[column].endswith(told_otherwise):
            assert float(published[0]) == pytest.approx(value, rel=rel), column
    if row["warmup"].endswith("tokens"):
        assert optim.warmup_tokens == pytest.approx(1e6 * millions(row["warmup"].split(" ")[0]))
    elif row["warmup"][:1].isdigit():
        assert int(row["warmup"].split()[0]) == optim.warmup_steps
    assert row["precision"] == "" or train.precision in row["precision"]


def millions(text: str) -> float:
    """'124.4M' or '1.558B'."""
    return number(re.match(r"[\d.]+[MB]", text)[0]) / 1e6  # type: ignore[index]
