"""A run whose text has rubbish in one place: the spike is found, gone back for, and never trained on, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from random import Random

import pytest

from megagpt.checkpoint import folders
from megagpt.checkpoint.integrity import read_sums
from megagpt.checkpoint.state import State, read_state
from megagpt.config.values import Split
from megagpt.data.indexed.blend import build_splits
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.text.prepare import TokenizerFiles, prepare
from megagpt.processes.local import warm_up
from megagpt.train.metrics_file import NAME, read_rows
from tests.soak.ranks import start

STEPS, BATCH, SEQ_LEN, SAVE_INTERVAL = 115, 8, 32, 20
REWIND = ("--faults.on-spike", "rewind", "--faults.spike-zscore", "5")  # the window still has the steep beginning
RUBBISH = 150  # the document that has it
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> str:
    """The alphabet again and again, which is soon learnt, and one document of random letters."""
    warm_up()
    folder, random = tmp_path_factory.mktemp("text"), Random(0)
    texts = ["abcdefghijklmnopqrstuvwxyz" * random.randint(2, 6) for _ in range(400)]
    texts[RUBBISH] = "".join(random.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=60))
    source = folder / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(source)], str(folder / "text"), TokenizerFiles(kind="bytes"), append_eod=True, workers=1)
    return str(folder / "text_text_document")


@pytest.fixture(scope="module")
def seed_and_step(dataset) -> tuple[int, int]:
    """A seed with which one step, counted from 1, reads all the rubbish: late enough to be judged."""
    for seed in range(2000):
        samples, _, _ = build_splits(
            [IndexedDataset(dataset)], (), Split.parse("1"), SEQ_LEN, seed, (STEPS * BATCH, 0, 0)
        )
        assert samples is not None
        reads = [i for i in range(STEPS * BATCH) if any(piece[1] == RUBBISH for piece in samples.sources_of(i))]
        steps = {i // BATCH + 1 for i in reads}
        if len(steps) == 1 and steps <= set(range(101, 110)):
            return seed, steps.pop()
    raise AssertionError("no seed will do")


def train(run: Path, dataset: str, seed: int, *more: str) -> None:
    """The program on two ranks; what it writes is beside the run folder."""
    words = f"""
        --n-layers 2 --d-model 32 --n-heads 4 --seq-len {SEQ_LEN} --tp 2 --micro-batch-size 2 --split 1 --eval-steps 0
        --global-batch-size {BATCH} --train-steps {STEPS} --train.seed {seed} --lr 0.01 --warmup-steps 4
        --model.dropout-residual 0.1 --save-interval {SAVE_INTERVAL} --async-save --auto-resume
    """.split()
    notes = run.with_name(run.name + "-notes")
    job = start("fork", 2, [*words, "--data-path", dataset, "--save", str(run), *more], notes)
    try:
        assert job.wait(200) == [0, 0], Path(f"{notes}-rank-0.out").read_text()
    finally:
        job.kill()


def outcome(run: Path) -> tuple[dict[str, str], State, list[tuple]]:
    """The hashes of the last tensors, where the run stands, and its curve."""
    last = folders.pointed(run)
    state = read_state(last)
    assert state.step == STEPS
    tensors = {name: digest for name, digest in read_sums(last).items() if name.endswith(".safetensors")}
    rows = [(row["step"], row["loss"], row["grad_norm"], row["lr"]) for row in read_rows(run / NAME)]
    assert [step for step, *_ in rows] == list(range(1, STEPS + 1))
    return tensors, state, rows


def test_a_spike_is_rewound_as_if_its_step_had_been_left_out(tmp_path, dataset, seed_and_step):
    seed, step = seed_and_step
    rewound, left_out, killed = tmp_path / "rewound", tmp_path / "left-out", tmp_path / "killed"
    train(rewound, dataset, seed, *REWIND)
    text = (tmp_path / "rewound-notes-rank-0.out").read_text()
    assert f"step {step}: spike: " in text and f"and on without step {step}\n" in text
    note = json.loads((rewound / "faults" / f"step-{step:06d}.json").read_text())
    assert any(piece["document"] == RUBBISH for sample in note["samples"] for piece in sample["documents"])
    assert any(letter in sample["text"] for sample in note["samples"] for letter in "QXZ")
    tensors, state, rows = outcome(rewound)
    assert state.skipped_steps == [step] and state.counters["skipped_steps"] == 1
    assert [row[0] for row in rows if row[1] is None] == [step]

    train(left_out, dataset, seed, "--faults.skip-steps", str(step), "--faults.spike-zscore", "5")
    theirs = outcome(left_out)
    assert theirs[0] == tensors and theirs[2] == rows
    assert (theirs[1].skipped_steps, theirs[1].counters, theirs[1].guard) == ([step], state.counters, state.guard)

    # Killed when the rewind had been written down, and nothing else of it had happened.
    shutil.copytree(rewound, killed)
    before = [folder for folder in folders.checkpoints_of(killed) if folders.step_of(folder) < step]
    for folder in folders.checkpoints_of(killed)[len(before) :]:
        shutil.rmtree(folder)
    folders.point_to(before[-1])
    train(killed, dataset, seed, *REWIND)
    assert f"steps that are left out: {step}\n" in (tmp_path / "killed-notes-rank-0.out").read_text()
    assert outcome(killed)[0] == tensors and outcome(killed)[2] == rows
