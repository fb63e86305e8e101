"""The program as a user runs it: from a run of ours and from a folder of transformers, killed and gone on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megagpt.checkpoint import folders
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.rewrite import write_checkpoint
from megagpt.checkpoint.state import State
from megagpt.config import DataConfig, ModelConfig, RunConfig, plain
from megagpt.errors import UserError
from megagpt.finetune.start import find_work, parse_finetune_config
from megagpt.hf import hf_config
from megagpt.inventory.layers import canonical
from megagpt.inventory.parameter import WEIGHT
from tests.finetune.examples import write_glue, write_lines, write_pairs
from tests.finetune.rank import run_program
from tests.logical import drawn

pytestmark = pytest.mark.timeout(300)

MODEL = ModelConfig(n_layers=2, d_model=32, n_heads=4, seq_len=48, vocab_size=257)
SMALL = "--global-batch-size 4 --micro-batch-size 2 --eval-interval 3 --save-interval 3 --warmup-steps 1 --lr 1e-3"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run whose weights are those that another seed draws."""
    run = tmp_path_factory.mktemp("base") / "run"
    tensors = {name: drawn(p.init, p.shape, name, 77).numpy() for name, p in canonical(MODEL).items()}
    config = RunConfig(model=MODEL, data=DataConfig(tokenizer="bytes"))
    at = State(step=0, samples=0, tokens=0, lr=0.0, counters={"skipped_steps": 0}, config=plain(config), data={})

    def rows_of(key: str, name: str, rows: range) -> Any:
        yield tensors[name][rows.start : rows.stop]

    checkpoint = folders.folder_of(run, 0)
    write_checkpoint(checkpoint, at, {WEIGHT: {name: values.shape for name, values in tensors.items()}}, rows_of)
    folders.point_to(checkpoint)
    return run


def rows(run: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without times."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time", "step_time_s", "tokens_per_s", "tflops_per_process")
    return [{key: value for key, value in row.items() if key not in timed} for row in found]


def tensors(run: Path) -> dict[tuple[str, str], np.ndarray]:
    """All that the newest checkpoint keeps."""
    with Reader(folders.pointed(run)) as reader:
        return {
            (key, name): reader.read(key, name, (0,) * len(shape), shape)
            for key, names in reader.index.items()
            for name in names
            for shape in [reader.shape(key, name)]
        }


def test_a_killed_run_goes_on_to_the_bit(tmp_path, base):
    """Losses, metrics, moments, predictions: as of a run that nobody touched."""
    data = write_glue(tmp_path / "train.tsv", "SST-2", 30)
    common = f"--task SST-2 --base {base} --train-file {data} --valid-file {data} --finetune.test-file {data} {SMALL}"
    argv = f"{common} --epochs 4 --finetune.layer-decay 0.9 --auto-resume".split()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_program([*argv, "--save", str(whole)], tmp_path / "whole.out") == [0], (
        tmp_path / "whole.out"
    ).read_text()
    assert run_program([*argv, "--save", str(killed)], tmp_path / "killed.out", killed_at=5) == [-9]
    assert (killed / "checkpoints" / "step-000003").is_dir()
    assert run_program([*argv, "--save", str(killed)], tmp_path / "killed.out") == [0]
    assert rows(killed) == rows(whole) and max(row["step"] for row in rows(whole)) > 6
    wanted, found = tensors(whole), tensors(killed)
    assert wanted.keys() == found.keys()
    for key, values in wanted.items():
        np.testing.assert_array_equal(found[key], values, str(key))
    for name in ("result.json", "predictions/valid.tsv", "predictions/test.tsv"):
        assert (killed / name).read_text() == (whole / name).read_text()
    result = json.loads((whole / "result.json").read_text())
    scores = [row["accuracy"] for row in rows(whole) if "accuracy" in row]
    assert result["score"] == max(scores) and result["step"] in (row["step"] for row in rows(whole))
    assert len((whole / "predictions" / "test.tsv").read_text().splitlines()) == 31
    assert folders.step_of(folders.find(f"{whole}@best")) == result["step"]  # the checkpoint that predicted them


def test_completions_on_several_ranks(tmp_path, base):
    """What has no classifier: trained by two stages, judged by the loss of its completions."""
    data = write_pairs(tmp_path / "pairs.jsonl")
    argv = f"--task completion --base {base} --train-file {data} --valid-file {data} {SMALL} --epochs 2 --pp 2".split()
    out = tmp_path / "out"
    assert run_program([*argv, "--save", str(tmp_path / "run")], out, n_ranks=2) == [0, 0], out.read_text()
    losses = [row["validation_loss"] for row in rows(tmp_path / "run") if "validation_loss" in row]
    assert losses[-1] < losses[0]
    assert not (tmp_path / "run" / "result.json").exists()


def masters_after(argv: list[str], tmp_path: Path) -> dict[tuple[str, str], np.ndarray]:
    out = tmp_path / "out"
    assert run_program([*argv, "--save", str(tmp_path / "run")], out) == [0], out.read_text()
    return tensors(tmp_path / "run")


def test_the_base_is_what_it_begins_with(tmp_path, base):
    """At a rate that moves nothing: the weights are those of the base, and a classifier begins anew."""
    data = write_glue(tmp_path / "train.tsv", "CoLA")
    argv = f"--task CoLA --base {base} --train-file {data} {SMALL} --train-steps 1 --lr 1e-30 --warmup-steps 0".split()
    found = masters_after(argv, tmp_path)
    for name, parameter in canonical(MODEL).items():
        wanted = drawn(parameter.init, parameter.shape, name, 77).numpy()
        np.testing.assert_allclose(found[WEIGHT, name], wanted, rtol=0, atol=1e-29, err_msg=name)
    assert found[WEIGHT, "head.classifier.weight"].shape == (2, 32)
    # That run is a base in its turn: another task leaves its classifier behind.
    config, again = parse_finetune_config(f"--task MNLI --base {tmp_path / 'run'} --train-file {data}".split())
    assert again is not None and again.model.n_classes == 0 and config.model.d_model == 32


def test_a_folder_of_transformers_is_a_base(tmp_path):
    import transformers  # 2 s

    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(MODEL)))
    theirs.save_pretrained(tmp_path / "hf")
    data = write_pairs(tmp_path / "pairs.jsonl")
    argv = f"--task completion --base {tmp_path / 'hf'} --train-file {data} {SMALL} --tokenizer bytes".split()
    found = masters_after([*argv, *["--train-steps", "1", "--lr", "1e-30", "--warmup-steps", "0"]], tmp_path)
    wanted = theirs.state_dict()["transformer.wte.weight"].numpy()
    np.testing.assert_allclose(found[WEIGHT, "embedding.tokens.weight"], wanted, rtol=0, atol=1e-29)


def work_of(arguments: str) -> Any:
    return find_work(*parse_finetune_config(arguments.split()))


def test_epochs_become_steps_and_no_weights_leave_the_architecture(tmp_path, base):
    data = write_glue(tmp_path / "train.tsv", "SST-2", 30)
    common = f"--task SST-2 --base {base} --train-file {data} --global-batch-size 4 --micro-batch-size 2"
    config, work = work_of(f"{common} --epochs 2 --finetune.no-pack --finetune.no-weights")
    assert config.train.train_steps == 15 and config.model.n_classes == 2 and config.optim.lr == 6.25e-5
    assert config.model.d_model == 32 and not config.finetune.weights and not config.checkpoint.keep_best
    assert work.tokenizer.kind == "bytes"
    packed, _ = work_of(f"{common} --epochs 2")
    assert packed.train.train_steps < 8
    assert work_of(f"{common} --train-steps 7")[0].train.train_steps == 7


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--train-file {data}", "--task is missing"),
        ("--task SST-2", "--train-file is missing"),
        ("--task SST-2 --base {base} --train-file {data} --n-layers 4", "has model.n_layers=2, and 4 is asked for"),
        ("--task SST-2 --base {base}/none --train-file {data}", "no checkpoint in"),
        ("--task SST-2 --train-file {data}", "no tokenizer is known"),
        ("--task SST-2 --base {base} --train-file {data} --finetune.frozen blocks.7", "is no part of this model"),
        (
            "--task SST-2 --base {base} --train-file {data} --finetune.frozen embedding blocks head",
            "leaves nothing to learn",
        ),
        ("--task SST-2 --base {base} --train-file {data} --finetune.layer-decay 1.5", "must be at most 1"),
        ("--task completion --base {base} --train-file {talk}", "brings no chat template"),
        (
            "--task SST-2 --base {base} --train-file {data} --train.seq-len-start 8 --train.seq-len-warmup-steps 4",
            "rows of examples are whole",
        ),
    ],
)
def test_what_does_not_fit_is_told(tmp_path, base, arguments, said):
    data = write_glue(tmp_path / "train.tsv", "SST-2")
    talk = write_lines(tmp_path / "talk.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}])
    with pytest.raises(UserError) as caught:
        work_of(arguments.format(base=base, data=data, talk=talk))
    assert said in str(caught.value)
