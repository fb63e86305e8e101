"""Every shipped preset parses, plans, and has the number of parameters that is published for it."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest

from megagpt.cli import parse_run_config
from megagpt.config import ModelConfig, RunConfig
from megagpt.plan.plan import make_plan
from megagpt.presets import preset_names, preset_path

FACTS = Path(__file__).parents[2].parent / "shared" / "facts" / "models.csv"

# Parameters, exactly. GPT-2: what transformers' GPT2LMHeadModel of the released configurations has, which is
# the 124M, 355M, 774M and 1558M of the openai/gpt-2 model card. MosaicML: the same count for the shapes of its
# model card. 580M: the same count for the shape in the training log, its positions left out.
EXACT = {
    "gpt2-small": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "mosaic-gpt2-52m": 51_475_968,
    "mosaic-gpt2-83m": 82_056_320,
    "mosaic-gpt2-125m": 124_439_808,
    "gpt-580m-alibi": 587_237_376,
}
# Row of ../shared/facts/models.csv (column "model") for each preset.
ROWS = {
    "gpt2-small": "GPT-2 small",
    "gpt2-medium": "GPT-2 medium",
    "gpt2-large": "GPT-2 large",
    "gpt2-xl": "GPT-2 XL",
    "mosaic-gpt2-52m": "GPT-2 52M",
    "mosaic-gpt2-83m": "GPT-2 83M",
    "mosaic-gpt2-125m": "GPT-2 125M",
    "gpt-580m-alibi": "GPT-580M (ALiBi)",
}


def load(name: str) -> RunConfig:
    return parse_run_config(["--preset", name])


def params(model: ModelConfig) -> int:
    return make_plan(RunConfig(model=model), world_size=4).params


def test_all_presets_are_held():
    assert sorted([*EXACT, "tiny"]) == preset_names()


@pytest.mark.parametrize("name", EXACT)
def test_parameters(name):
    config = load(name)
    assert make_plan(config, world_size=4).params == EXACT[name]
    assert f"{EXACT[name]:,}" in preset_path(name).read_text()  # the comment says so too


@pytest.mark.parametrize("name", [name for name in EXACT if name.startswith("gpt2")])
def test_transformers_counts_the_same(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = load(name).model
    theirs = transformers.GPT2Config(
        n_layer=model.n_layers, n_embd=model.d_model, n_head=model.n_heads, vocab_size=model.vocab
    )
    with torch.device("meta"):
        gpt2 = transformers.GPT2LMHeadModel(theirs)
    gpt2.tie_weights()  # on the meta device the tie is not made by itself
    assert sum(p.numel() for p in gpt2.parameters()) == EXACT[name]


def test_tiny_is_the_default():
    assert load("tiny") == RunConfig()


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_names_its_source_and_can_be_cut(name):
    config = load(name)
    first_line, *rest = preset_path(name).read_text().splitlines()
    assert first_line.startswith("# ")
    assert rest[0].startswith("# ")
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
    assert abs(EXACT[name] - stated) > 2e6  # … and not that of the shape beside it,
    name_millions = int(name.removesuffix("m").rsplit("-", 1)[1])
    assert math.ceil(EXACT[name] / 1e6) == name_millions  # whose count, rounded up, is the name


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
        assert int(row[column]) == value, column
    if row["params_computed"]:
        assert millions(row["params_computed"]) == pytest.approx(EXACT[name] / 1e6, rel=5e-4)
    elif name in MOSAIC_STATED:
        assert millions(row["params_stated"]) == MOSAIC_STATED[name][0] / 1e6
    else:
        assert millions(row["params_stated"]) == pytest.approx(EXACT[name] / 1e6, rel=0.02)
    if row["lr"]:
        assert float(row["lr"]) == optim.lr
        assert float(row["lr_min"]) == pytest.approx(optim.lr * optim.min_lr_fraction)
        assert row["warmup"] == f"{optim.warmup_steps} steps"
    if row["batch_tokens"]:
        assert float(row["batch_tokens"]) == pytest.approx(config.train.global_batch_size * model.seq_len, rel=0.05)


def millions(text: str) -> float:
    """'124.4M' or '1.558B'."""
    return float(text[:-1]) * {"M": 1, "B": 1000}[text[-1]]
