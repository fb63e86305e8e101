"""What a run says before its first step of data and schedule: each time the figure that it is about, and a remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megagpt.checkpoint.state import State
from megagpt.config import (
    CheckpointConfig,
    DataConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    plain,
)
from megagpt.config.values import DataPath, Split
from megagpt.data.indexed.dataset import IndexedWriter
from megagpt.data.indexed.meta import DatasetMeta
from megagpt.data.opened import OpenedData
from megagpt.data.tokenizers.bytes import ByteTokenizer
from megagpt.errors import UserError
from megagpt.schedule import Schedule
from megagpt.train.remarks import remarks
from megagpt.train.run import Run
from megagpt.train.text import Text

BYTES = ByteTokenizer()
META = DatasetMeta(
    tokenizer="bytes", tokenizer_files=(), tokenizer_sha256=BYTES.sha256, vocab_size=257, eod=256, append_eod=False,
    documents=0, tokens=0, text_bytes=0,
)  # fmt: skip


def write(prefix: Path, n_documents: int, meta: DatasetMeta = META, seed: int = 0) -> str:
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in random.integers(20, 180, n_documents):
            writer.add_document(random.integers(0, 256, length))
        writer.finish(replace(meta, documents=n_documents, tokens=writer.n_tokens))
    return str(prefix)


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    """500 documents, some 50,000 tokens: 95 % of them are 740 samples of 64."""
    return write(tmp_path / "data", 500)


def config(prefix: str, steps: int, **sections: object) -> RunConfig:
    train = TrainConfig(train_steps=steps, global_batch_size=8, micro_batch_size=8)
    data = DataConfig(data_path=DataPath((prefix,)))
    return replace(RunConfig(model=ModelConfig(seq_len=64, vocab_size=257), train=train, data=data), **sections)  # pyright: ignore[reportArgumentType]


def run_of(config: RunConfig, folder: Path = Path("runs/a")) -> Run:
    text = Text(OpenedData(config.data))
    train_samples, valid_samples = text.samples(config)
    identity = text.identity(config, train_samples, BYTES)
    return Run(config, None, None, folder, text, train_samples, valid_samples, BYTES, identity, folder)  # type: ignore[arg-type]


def said(now: RunConfig, before: RunConfig | None = None, step: int = 0, data: dict | None = None) -> list[str]:
    """What a run says that begins, or that goes on after so many steps of another."""
    state = None
    if before is not None:
        known = run_of(before).data_identity if data is None else data
        state = State(
            step=step, samples=8 * step, tokens=512 * step, lr=0.0, counters={}, config=plain(before), data=known
        )
    return list(remarks(run_of(now), Schedule(now), state))


def test_nothing_is_said_of_a_run_in_order(prefix: str):
    """Nor of a dataset of which nothing is recorded."""
    assert said(config(prefix, 80)) == said(config(prefix, 80), config(prefix, 80), 40) == []
    Path(f"{prefix}.json").unlink()
    assert said(config(prefix, 80)) == []


def test_a_run_that_is_extended_into_another_epoch(prefix: str):
    now, before = config(prefix, 160), config(prefix, 80)
    rate, order = said(now, before, 80)
    assert (
        "another learning rate: 0.0013 at step 81, which was going to have 0.0002, 6.5 times" in rate
        and "--optim.decay-steps 80 keeps it" in rate
    )
    assert "another order of the samples: with --train-steps 160 in place of 80 all 2 epochs" in order
    both, in_one_go = (dict(share.split("% ")[::-1] for share in part.split(", ")) for part in shares_of(order))
    assert both == {"never": "4", "once": "32", "twice": "54", "3 times": "10"}
    assert in_one_go == {"once": "31", "twice": "69"}
    assert f"--train-steps {last_of_an_epoch(before)} is the last that keeps the order" in order


def shares_of(remark: str) -> list[str]:
    first, second = remark.split("Of the tokens ")[1].split(" are read, where in one go it would be ")
    return [first, second.split(" (estimated)")[0]]


def last_of_an_epoch(config: RunConfig) -> int:
    return len(run_of(config).train_samples) // 8


def test_a_decay_of_its_own_and_the_same_epoch_are_quiet(prefix: str):
    fixed = OptimConfig(decay_steps=80)
    assert said(config(prefix, 85, optim=fixed), config(prefix, 80, optim=fixed), 80) == []
    assert len(said(config(prefix, 160, optim=fixed), config(prefix, 80, optim=fixed), 80)) == 1


def test_nothing_is_held_out(tmp_path: Path):
    few = config(write(tmp_path / "few", 9), 80)
    (remark,) = said(few)
    assert "no validation: split 949,50,1 of 9 documents leaves it none" in remark
    assert said(replace(few, log=LogConfig(eval_steps=0))) == []
    alone = replace(few, data=replace(few.data, split=Split.parse("1")))
    assert said(alone) == []
    (remark,) = said(replace(alone, log=LogConfig(eval_interval=7)))
    assert "split 1 has no share for it, so that --eval-interval 7 does nothing" in remark
    assert said(config(write(tmp_path / "ten", 10), 80, log=LogConfig(eval_steps=1))) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"checkpoint": CheckpointConfig(keep_best=True)}, "keep_best with split 949,50,1 of 9 documents"),
        ({"split": "98,1,1"}, "data.split=98,1,1 leaves none of 9 documents for validation"),
    ],
)
def test_what_needs_validation_is_refused_without(tmp_path: Path, change: dict, words: str):
    few = config(write(tmp_path / "few", 9), 80)
    if split := change.pop("split", None):
        change = {"data": replace(few.data, split=Split.parse(split))}
    with pytest.raises(UserError, match=words):
        run_of(replace(few, **change))


def test_other_data_is_called_what_it_is(prefix: str, tmp_path: Path):
    before = config(prefix, 80)
    split = replace(before, data=replace(before.data, split=Split.parse("90,10")))
    (remark,) = said(split, before, 40)
    assert "another split: --split was 949,50,1 and is 90,10;" in remark
    (remark,) = said(config(write(tmp_path / "other", 500, seed=1), 80), before, 40)
    assert f"other data: --data-path was {prefix} and is {tmp_path}/other" in remark
    moved = config(write(tmp_path / "moved", 500), 80)
    assert said(moved, before, 40) == []


def test_weights_of_another_tokenizer(prefix: str):
    imported = replace(config(prefix, 80), data=DataConfig(tokenizer="bytes"))
    assert said(config(prefix, 80), imported, data={"tokenizer_sha256": BYTES.sha256}) == []
    assert said(config(prefix, 80), replace(imported, data=DataConfig()), data={}) == []
    (remark,) = said(config(prefix, 80), replace(imported, data=DataConfig()), data={"tokenizer_sha256": "ab" * 32})
    assert "another tokenizer: the weights know the ids of one (SHA-256 abababab" in remark
    assert "(bytes, 257 tokens)" in remark


def test_a_tokenizer_that_loses_text(tmp_path: Path):
    lossy = replace(META, unknown_tokens=10_000, lost_share=0.25, lost_characters="\nT")
    first, second = said(config(write(tmp_path / "lossy", 500, lossy), 80))
    assert "% of the tokens stand for text that the tokenizer does not know" in first
    assert "about 25.0% of the text" in second and r"most of all '\n', 'T'" in second


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        (OptimConfig(warmup_steps=200), ["the warm-up takes 200 steps and the run has 80", "to 0.0004, not to 0.001"]),
        (OptimConfig(warmup_steps=40, decay_steps=20), ["the decay ends at 20 steps", "step 40", "0.001 to 0.0001 at"]),
        (OptimConfig(warmup_steps=20, decay_steps=40), []),
        (OptimConfig(warmup_steps=80), []),
    ],
)  # fmt: skip
def test_a_warm_up_that_does_not_fit(prefix: str, optim: OptimConfig, words: list[str]):
    found = said(config(prefix, 80, optim=replace(optim, lr=1e-3)))
    assert len(found) == bool(words) and all(word in found[0] for word in words)
