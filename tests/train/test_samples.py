"""Texts written during training: the same in every layout, and nothing of the training is moved by them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megagpt.cli import parse_run_config
from megagpt.config import ModelConfig, RunConfig
from megagpt.data.tokenizers.bytes import ByteTokenizer
from megagpt.processes.local import run_ranks
from megagpt.train.samples import Sample, write_samples
from tests.parity.rank import batches_of, start_engine
from tests.parity.walk import Layout, parity_config, spread_out

MODEL = ModelConfig(n_layers=2, d_model=32, n_heads=4, seq_len=16, vocab_size=257)
PROMPTS = ("ab", "some words")


def _train(config: RunConfig, dp: int) -> tuple[list[float], list[list[Sample]]]:
    """On a rank: the losses of four steps, and the texts after the second and the fourth."""
    engine, losses, texts = start_engine(config, dp), [], []
    for step in range(4):
        losses.append(engine.train_step(step, batches_of(config, step, engine.mesh.data)).loss)
        if step % 2 and config.log.sample_prompts:
            texts.append(write_samples(engine, ByteTokenizer()))
    engine.close()
    return losses, texts


def _config(layout: Layout, prompts: tuple[str, ...] = PROMPTS) -> RunConfig:
    config = spread_out(parity_config(MODEL), layout)
    return replace(config, log=replace(config.log, sample_prompts=prompts, sample_tokens=24))


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], list[list[Sample]]]:
    return run_ranks(_train, 1, _config(Layout()), 1)[0]


def test_training_goes_on_as_if_nothing_had_been_written(expected):
    losses, texts = expected
    assert run_ranks(_train, 1, _config(Layout(), ()), 1) == [(losses, [])]
    assert [[sample.prompt for sample in found] for found in texts] == [list(PROMPTS)] * 2
    assert all(sample.text for found in texts for sample in found) and texts[0] != texts[1]


@pytest.mark.parametrize("layout", [Layout(tp=2, pp=2), Layout(tp=2, dp=2, zero_stage=3)], ids=str)
def test_all_ranks_of_every_layout_write_the_same(expected, layout):
    for losses, texts in run_ranks(_train, layout.world_size, _config(layout), layout.dp):
        assert texts == expected[1]
        assert losses == pytest.approx(expected[0], rel=1e-5)


def test_a_prompt_with_spaces_is_one_prompt(tmp_path: Path):
    flags = parse_run_config(["--log.sample-prompts", "def main():", "Once upon"])
    assert flags.log.sample_prompts == ("def main():", "Once upon")
    (tmp_path / "a.yaml").write_text("log:\n  sample_prompts: 'def main():'\n")
    assert parse_run_config(["--config", str(tmp_path / "a.yaml")]).log.sample_prompts == ("def main():",)
