"""The whole program with growing batches and sequences: what it counts, and a resume in the middle, to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from megagpt.checkpoint import folders
from megagpt.checkpoint.state import read_state
from megagpt.processes.local import warm_up
from megagpt.train.metrics_file import NAME, read_rows
from tests.soak.ranks import start
from tests.soak.trace import EXACT, contents_of
from tests.tiny_data import VOCAB_SIZE, write_tiny_data

STEPS, SAVED = 12, 5
SIZES = [(4, 8)] * 2 + [(4, 16)] * 2 + [(8, 24), (8, 32)] + [(12, 32)] * 6  # sequences, and tokens of each
pytestmark = pytest.mark.timeout(200)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    warm_up()
    return write_tiny_data(tmp_path_factory.mktemp("data") / "tokens")


def train(run: Path, dataset: str, *more: str) -> str:
    """The program on two ranks; returns what it showed."""
    words = f"""
        --n-layers 2 --d-model 32 --n-heads 4 --seq-len 32 --vocab-size {VOCAB_SIZE} --split 90,10,0
        --data-path {dataset} --train.batch-steps 4@1,8@5,12@7 --global-batch-size 12 --micro-batch-size 2
        --train.seq-len-start 8 --train.seq-len-warmup-steps 5 --warmup-tokens 200 --optim.decay-tokens 3000
        --eval-interval 4 --eval-steps 2 --save-interval {SAVED} --faults.skip-steps 3 --log.noise-scale
        --model.dropout-residual 0.1 --train-steps {STEPS}
    """.split()
    notes = run.with_name(run.name + "-notes")
    job = start("fork", 2, [*words, "--save", str(run), *more], notes)
    try:
        assert job.wait(100) == [0, 0], Path(f"{notes}-rank-0.out").read_text()
    finally:
        job.kill()
    return Path(f"{notes}-rank-0.out").read_text()


def exact_rows(run: Path) -> list[dict]:
    """What metrics.jsonl says, to the bit, and no times."""
    return [
        {name: row[name] for name in ("step", "noise_scale_tokens", *EXACT) if name in row}
        for row in read_rows(run / NAME)
    ]


@pytest.fixture(scope="module", params=["--pp 2", "--tp 1"])
def whole(request, tmp_path_factory, dataset) -> tuple[list[str], Path, str]:
    layout, run = request.param.split(), tmp_path_factory.mktemp("runs") / "whole"
    return layout, run, train(run, dataset, *layout)


def test_what_it_counts(whole):
    _, run, shown = whole
    rows = [row for row in read_rows(run / NAME) if "loss" in row]
    tokens = [sum(batch * length for batch, length in SIZES[:step]) for step in range(1, STEPS + 1)]
    assert [row["tokens"] for row in rows] == tokens
    assert [row["loss"] is None for row in rows] == [step == 3 for step in range(1, STEPS + 1)]
    state = read_state(folders.pointed(run))
    assert (state.samples, state.tokens) == (sum(batch for batch, _ in SIZES), tokens[-1])
    assert "(from 4 of 8 at the first)" in shown and f"{STEPS} steps, {tokens[-1] / 1000:.4g}k tokens" in shown
    # FLOPs of a token are those of whole sequences: no figure until all steps of the window have them.
    assert ["tflops_per_process" in row for row in rows] == [False] * STEPS


def test_a_resume_in_the_middle_changes_no_bit(whole, tmp_path, dataset):
    layout, run, _ = whole
    train(tmp_path / "second", dataset, *layout, "--load", f"{run}@{SAVED}")
    expected = [row for row in exact_rows(run) if row["step"] > SAVED]
    assert exact_rows(tmp_path / "second") == expected and len(expected) > STEPS - SAVED
    first, second = folders.pointed(run), folders.pointed(tmp_path / "second")
    assert contents_of(second) == contents_of(first)
    assert read_state(second).noise_scale == read_state(first).noise_scale != {}
