"""The search: what it offers runs and fits, nothing listed is faster than the first, and refusals say what to do."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megagpt.config import ModelConfig
from megagpt.errors import UserError
from megagpt.plan.draw import draw
from megagpt.plan.footprint import fits
from megagpt.plan.job import Job, Layout
from megagpt.plan.machine import machine
from megagpt.plan.search import POSSIBLE, TODAY, lacks, runs_today, search
from megagpt.plan.search_report import run_command

GPT = ModelConfig(n_layers=32, d_model=4096, n_heads=32, seq_len=2048, vocab_size=50257)
A100 = machine("a100-80g")


def test_the_best_fit_and_are_in_order():
    found = search(GPT, 64, 512, A100, POSSIBLE)
    seconds = [f.step.seconds for f in found.best]
    assert seconds == sorted(seconds) and all(fits(f.job) for f in found.best)
    layout = found.best[0].job.layout
    assert layout.tp * layout.pp * layout.dp * layout.cp == 64
    assert found.rejected["does not fit the memory"] > 0


def test_today_needs_nothing_that_is_missing_and_is_no_faster():
    today, possible = search(GPT, 64, 512, A100, TODAY, runs_today), search(GPT, 64, 512, A100, POSSIBLE)
    assert all(not lacks(f.job.layout) for f in today.best)
    assert today.best[0].step.seconds >= possible.best[0].step.seconds


def test_what_is_lacking_is_named():
    layout = Layout(gpus=8, tp=2, pp=2, virtual=2, dp=2, sequence_parallel=True, schedule="interleaved")
    assert lacks(layout) == ["sequence parallel", "interleaved stages"]


def test_the_command_names_the_layout():
    best = search(GPT, 64, 512, A100, TODAY, runs_today).best[0]
    layout = best.job.layout
    command = run_command(best, "--preset gpt3-6.7b")
    assert f"--preset gpt3-6.7b --tp {layout.tp} --pp {layout.pp} " in command


def test_a_model_that_fits_nowhere_says_how_much_it_needs():
    huge = replace(GPT, n_layers=96, d_model=12288, n_heads=96)
    with pytest.raises(UserError, match=r"hold no layout: the leanest needs \d+ GiB a GPU; use more GPUs"):
        search(huge, 8, 64, A100, TODAY, runs_today)


def test_a_batch_that_no_layout_divides_is_refused():
    with pytest.raises(UserError, match="leaves no layout"):
        search(replace(GPT, n_heads=1, d_head=4096, n_layers=1), 64, 3, A100, TODAY, runs_today)


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_a_schedule_is_drawn(tmp_path, suffix):
    layout = Layout(gpus=4, pp=4, virtual=2, schedule="interleaved", global_batch=8)
    draw(Job(GPT, layout, POSSIBLE, A100), tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").stat().st_size > 5000


def test_another_kind_of_picture_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no \.svg or \.png"):
        draw(Job(GPT, Layout(gpus=4, pp=4, global_batch=8), POSSIBLE, A100), tmp_path / "a.pdf")


def test_a_gpu_that_is_not_known_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="did you mean a100-80g"):
        machine("a100-80")
