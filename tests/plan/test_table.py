"""The start-up tables: what they say, and that they fit a screen."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from megagpt.cli import parse_run_config
from megagpt.console import show
from megagpt.plan.plan import make_plan
from megagpt.plan.table import config_table, plan_table


def shown(*argv: str, world_size: int, width: int = 100) -> str:
    config = parse_run_config(argv)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    show(console, config_table(config))
    show(console, plan_table(config, make_plan(config, world_size)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_what_matters_is_there():
    text = shown("--preset", "gpt2-small", "--tp", "2", "--pp", "2", "--partition", "8,4", world_size=16)
    for part in (
        "n_layers=12*",  # changed
        "tied_embeddings=True",  # default
        "16 processes: pp 2, dp 4, tp 2; ZeRO 1",
        "512 sequences of 1,024 = 524,288 tokens a step; 4 (micro-batch) * 32 * 4 (dp)",
        "124.4M parameters, 854.4 MFLOP a token, 448 TFLOP a step",
        "50,257 tokens, padded to 50,432: 25,216 rows a rank",
        "20,000 steps, 10.49B tokens (84.3 a parameter), 8.959 EFLOP",
        "3 % of a step is bubble: 2 stages, 32 micro-batches",
        "0-7    emb + 0-7",
        "8-15   8-11 + head",
    ):
        assert part in text
    assert "n_layers=12* " in text
    assert "wandb_project" not in text  # off by default, and off


def test_a_screenful_at_100_columns():
    argv = ["--preset", "gpt2-xl", "--tp", "5", "--pp", "8", "--micro-batch-size", "16", "--precision", "bf16"]
    text = shown(*argv, "--data-path", "0.7", "/data/wiki_text_document", "0.3", "/data/b", world_size=640)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert "…" not in text  # nothing cut
    assert len(lines) <= 50  # of an editor's window; 48 before adapters and fine-tuning had settings
    assert "it never fills" in text  # 2 micro-batches for 8 stages


@pytest.mark.parametrize(
    ("argv", "world_size"),
    [
        ("--vocab-size 1000", 1),
        ("--preset gpt3-175b --tp 8 --pp 16", 1024),
        ("--preset palm-540b --tp 12 --zero-stage 3 --recompute", 6144),
        ("--preset mt-nlg-530b", 1),
    ],
)
def test_80_columns_cut_nothing_and_fill_no_line_up(argv: str, world_size: int):
    lines = shown(*argv.split(), world_size=world_size, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)
    assert not [line for line in lines if line != line.rstrip()]
    heading = next(number for number, line in enumerate(lines) if line.split()[:1] == ["stage"])
    assert " ".join(lines[heading].split()) == "stage ranks layers local weights grads optim activ logits total"
    assert len([line for line in lines[heading + 2 :] if line]) == (16 if "--pp" in argv else 1)  # a line a stage


def test_one_stage_has_no_bubble():
    text = shown("--vocab-size", "1000", "--parallel.offload-optimizer", world_size=1)
    assert "bubble" not in text
    assert "emb + 0-3 + head" in text
    assert "optimizer in host memory" in text
