"""Every published model, small, trains on tp=2, pp=2 as on one process, at a sequence length of its own."""

from __future__ import annotations

import pytest

from megagpt.cli import parse_run_config
from megagpt.config import RunConfig
from megagpt.errors import UserError
from megagpt.presets import preset_names
from tests.parity import walk as parity
from tests.parity.shrunken import shrunken
from tests.parity.walk import REFERENCE, Layout, compare, require_lively, run_layout
from tools import parity as tools_parity

SEQ_LEN = 19  # neither the default nor a preset's own, and odd
# Presets that become the same run when shrunken are trained once.
ALIKE = {
    "gpt1": {"gpt1"},
    "gpt3-175b": {f"gpt3-{size}" for size in ("small", "medium", "large", "xl", "2.7b", "6.7b", "13b", "175b")},
    "gopher-280b": {"gopher-280b"},
    "palm-540b": {"palm-540b"},
    "llama-65b": {f"llama-{size}" for size in ("7b", "13b", "33b", "65b")},
    "megatron-8.3b": {"megatron-8.3b"},
    "gpt-580m-alibi": {"gpt-580m-alibi"},
    "gpt2-small": {f"gpt2-{size}" for size in ("small", "medium", "large", "xl")},
    "mosaic-gpt2-125m": {f"mosaic-gpt2-{size}" for size in ("52m", "83m", "125m")},
    "jurassic-1-jumbo": {"jurassic-1-large", "jurassic-1-jumbo"},
    "mt-nlg-530b": {"mt-nlg-530b"},
    "gopher-44m": {f"gopher-{size}" for size in ("44m", "117m", "417m", "1.4b", "7.1b")},
    "chinchilla-70b": {"chinchilla-70b"},
    "palm-62b": {"palm-8b", "palm-62b"},
}

NEAR = ("mosaic-gpt2-125m", "gpt3-175b", "megatron-8.3b", "jurassic-1-jumbo", "mt-nlg-530b")  # GPT-2 but for details


def load(name: str, train_steps: int = 20) -> RunConfig:
    return shrunken(parse_run_config(["--preset", name]), seq_len=SEQ_LEN, train_steps=train_steps)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in NEAR else []) for n in ALIKE])
def test_a_preset_trains_in_parallel_as_on_one_process(name):
    config = load(name, train_steps=12)  # `make parity ARGS="--preset NAME"` goes on to 20
    reference = run_layout(config, REFERENCE)
    require_lively(reference, config)
    difference = compare(run_layout(config, Layout(tp=2, pp=2, zero_stage=1, micro_batch_size=2)), reference, config)
    assert difference.ok, difference


def test_every_preset_is_one_of_these_when_shrunken():
    runs = {name: load(name) for name in preset_names() if name != "tiny"}
    assert sorted(name for group in ALIKE.values() for name in group) == sorted(runs)
    for one, others in ALIKE.items():
        assert all(runs[name] == runs[one] for name in others), one


@pytest.mark.parametrize("name", ALIKE)
def test_what_makes_a_model_special_is_kept(name):
    full, small = parse_run_config(["--preset", name]), load(name)
    for field in (
        *(
            "block",
            "position",
            "rotary_fraction",
            "norm",
            "norm_position",
            "final_norm",
            "embedding_norm",
            "activation",
        ),
        *("bias_attention", "bias_mlp", "bias_norm", "bias_head", "tied_embeddings", "init", "init_std", "grouped"),
        *("dropout_embedding", "dropout_attention", "dropout_residual", "norm_eps"),
    ):
        assert getattr(small.model, field) == getattr(full.model, field), field
    kinds = [[pattern.kind for pattern in run.model.attention] for run in (small, full)]
    assert kinds[0] == kinds[1]
    d_inner, full_inner = (run.model.n_heads * run.model.head_width for run in (small, full))
    assert small.model.d_model / d_inner == pytest.approx(full.model.d_model / full_inner, rel=0.01)
    assert small.model.ff_width / small.model.d_model == pytest.approx(
        full.model.ff_width / full.model.d_model, rel=0.1
    )
    for field in ("optimizer", "schedule", "weight_decay", "weight_decay_times", "z_loss", "beta1", "beta2"):
        assert getattr(small.optim, field) == getattr(full.optim, field), field
    for field in ("batch_ramp_tokens", "batch_steps"):
        assert bool(getattr(small.train, field)) == bool(getattr(full.train, field)), field


def walked(monkeypatch: pytest.MonkeyPatch, *flags: str) -> RunConfig:
    """The run that tools/parity.py spreads out with these flags; nothing is trained."""
    seen: list[RunConfig] = []

    def walk(config: RunConfig, layouts: list[Layout]) -> list:
        seen.append(config)
        return []

    monkeypatch.setattr(parity, "walk", walk)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr("sys.argv", ["tools/parity.py", *flags])
    assert tools_parity.main() == 0
    return seen[0]


def test_the_walk_takes_a_preset_by_name(monkeypatch):
    assert walked(monkeypatch, "--preset", "palm-8b", "--seq-len", "19") == load("palm-8b")
    assert walked(monkeypatch, "--preset", "llama-7b").model.seq_len == 24
    assert walked(monkeypatch) == parity.parity_config()
    in_bf16 = walked(monkeypatch, "--preset", "gpt1", "--precision", "bf16")
    assert (in_bf16.train.precision, in_bf16.model.norm_position) == ("bf16", "post")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--preset", "gpt4"], "--preset gpt4 is not known; use one of these"),
        (["--seq-len", "19"], "--seq-len belongs to --preset"),
        (["--preset", "tiny"], "no published model"),
        (["--preset", "gpt1", "--seq-len", "0"], "--seq-len 0 is no length"),
    ],
)
def test_the_walk_refuses_in_one_line(monkeypatch, flags, expected):
    with pytest.raises(UserError, match=expected):
        walked(monkeypatch, *flags)
