"""tools/factorize.py and what it writes: a trained run becomes a factorised one, which trains on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from megagpt.adapt.factorise import write_factorised
from megagpt.checkpoint.folders import find
from megagpt.checkpoint.integrity import damage_of
from megagpt.checkpoint.load import load_weights
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.state import read_state
from megagpt.cli import read_config
from megagpt.config import ModelConfig, RunConfig, plain
from megagpt.data.text.prepare import TokenizerFiles, prepare
from megagpt.errors import UserError
from megagpt.inventory.parameter import WEIGHT
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import named_parameters
from megagpt.processes.local import warm_up
from tests.checkpoint.written_checkpoint import MODEL, gpt2_tensors, write_checkpoint
from tests.model.mlp.plain_factorised import monarch_dense
from tests.soak.ranks import start

ROOT = Path(__file__).parents[2]
STEPS = 30
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A dense model that has learnt the alphabet in 30 steps."""
    warm_up()
    folder, random = tmp_path_factory.mktemp("dense"), Random(0)
    texts = ["abcdefghijklmnopqrstuvwxyz" * random.randint(2, 6) for _ in range(200)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare(
        [str(folder / "text.jsonl")], str(folder / "text"), TokenizerFiles(kind="bytes"), append_eod=True, workers=1
    )
    words = f"""--n-layers 2 --d-model 32 --seq-len 32 --micro-batch-size 8 --global-batch-size 8 --train-steps {STEPS}
        --lr 0.01 --warmup-steps 4 --eval-steps 0 --data-path {folder}/text_text_document --save {folder}/run""".split()
    job = start("fork", 1, words, folder / "notes")
    try:
        assert job.wait(200) == [0], (folder / "notes-rank-0.out").read_text()
    finally:
        job.kill()
    return folder / "run"


def loaded(folder: Path) -> GPT:
    model = GPT(read_config(read_state(folder).config, "state").model, SINGLE)
    load_weights(named_parameters(model), folder)
    return model


@torch.no_grad()
def loss_of(folder: Path) -> float:
    letters = torch.arange(33) % 26 + ord("a")
    return float(loaded(folder)(letters[None, :-1], labels_BT=letters[None, 1:].contiguous()))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    with Reader(folder) as reader:
        assert reader.index.keys() == {WEIGHT}
        return {name: reader.read(WEIGHT, name) for name in reader.index[WEIGHT]}


def test_full_rank_changes_nothing(run, tmp_path):
    errors = write_factorised(find(run), tmp_path / "new", {"mlp": "low_rank", "mlp_rank": 32})
    assert len(errors) == 4 and all(0 < error.relative_error < 1e-6 for error in errors)
    assert loss_of(find(tmp_path / "new")) == pytest.approx(loss_of(find(run)), rel=1e-6)
    assert loss_of(find(run)) < 2  # it has learnt: a loss that the MLPs do not matter for would be equal anyway


def test_other_tensors_stay_and_errors_are_those_of_the_matrices(run, tmp_path):
    told = []
    errors = write_factorised(find(run), tmp_path / "new", {"mlp": "monarch", "mlp_blocks": 4}, told.append)
    assert [error.name for error in errors] == [f"blocks.{i}.mlp.{d}" for i in (0, 1) for d in ("up", "down")]
    assert set(told) == set(errors)
    with Reader(find(run)) as reader:
        dense = {name: reader.read(WEIGHT, name) for name in reader.index[WEIGHT]}
    new = tensors_of(find(tmp_path / "new"))
    for name in dense.keys() & new.keys():
        np.testing.assert_array_equal(new[name], dense[name], name)
    gone = {f"{error.name}.weight" for error in errors}
    assert dense.keys() - new.keys() == gone
    assert new.keys() - dense.keys() == {f"{error.name}.{factor}" for error in errors for factor in ("first", "second")}
    for error in errors:
        weight = torch.from_numpy(dense[f"{error.name}.weight"]).double()
        factors = [torch.from_numpy(new[f"{error.name}.{factor}"]).double() for factor in ("first", "second")]
        far = (monarch_dense(*factors) - weight).norm() / weight.norm()
        assert error.relative_error == pytest.approx(float(far), rel=1e-5) and error.relative_error > 0.01


@pytest.mark.parametrize("changes", [{"mlp": "butterfly"}, {"mlp": "monarch", "mlp_blocks": 2}], ids=lambda c: c["mlp"])
def test_what_is_written_is_whole_and_loads(tmp_path, changes):
    """With a gated unit, whose two matrices are one tensor."""
    model: ModelConfig = replace(MODEL, activation="swiglu")
    tensors = gpt2_tensors(MODEL)
    for i in range(model.n_layers):
        for name in ("weight", "bias"):
            up = tensors[f"blocks.{i}.mlp.up.{name}"]
            tensors[f"blocks.{i}.mlp.up.{name}"] = np.stack([up, -up])
    source = write_checkpoint(tmp_path / "run", 3, {WEIGHT: tensors}, config=plain(RunConfig(model=model)))
    errors = write_factorised(source, tmp_path / "new", changes)
    folder = find(tmp_path / "new")
    assert damage_of(folder) == [] and 0 < max(error.relative_error for error in errors) < 1
    at = read_state(folder)
    assert (at.step, at.samples, at.origin) == (0, 0, f"{changes['mlp']} form of run/step-000003")
    assert {n: tuple(p.shape) for n, p in loaded(folder).blocks.get_submodule("1.mlp").named_parameters()} == {
        name.removeprefix("blocks.1.mlp."): values.shape
        for name, values in tensors_of(folder).items()
        if name.startswith("blocks.1.mlp.")
    }


def tool(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tools" / "factorize.py"), *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)


@pytest.mark.slow
def test_the_tool_measures_and_fine_tunes(run, tmp_path):
    words = ("--mlp", "monarch", "--mlp-blocks", 8, "--out", tmp_path / "new", "--json", tmp_path / "new.json")
    done = tool(run, *words, "--fine-tune-steps", 20, "--", "--lr", "3e-3", "--eval-steps", 0)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "new.json").read_text())
    dense, factorised, tuned = (report[name] for name in ("dense", "factorised", "fine-tuned"))
    n_parameters = sum(values.size for values in tensors_of(find(f"{tmp_path / 'new'}@0")).values())
    assert factorised["parameters"] == tuned["parameters"] == n_parameters < dense["parameters"]
    assert dense["mlp_parameters"] == 2 * 2 * 32 * 128 and factorised["mlp_parameters"] == 2 * 2 * 8 * (32 + 128)
    saved = dense["parameters"] - factorised["parameters"]
    assert dense["flops_per_token"] - factorised["flops_per_token"] == 2 * saved
    assert dense["step_time_s"] > 0 and factorised["step_time_s"] > 0
    assert factorised["validation_loss"] > 1.01 * dense["validation_loss"]
    assert tuned["validation_loss"] < 0.95 * factorised["validation_loss"]
    assert f"{tuned['validation_loss']:.4f}" in done.stdout and "blocks.1.mlp" in done.stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--mlp", "monarch", "--mlp-blocks", 7), "model.mlp_blocks=7 must divide d_model=16, d_ff=64"),
        (("--mlp", "butterfly", "--", "--lr", "1"), "got --lr behind --, which is for fine-tuning"),
        (("--mlp", "dense"), "invalid choice: 'dense'"),
    ],
)
def test_the_tool_refuses_in_one_line(tmp_path, words, message):
    write_checkpoint(tmp_path / "run")
    end = words.index("--") if "--" in words else len(words)
    done = tool(tmp_path / "run", "--out", tmp_path / "new", *words[:end], *words[end:])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert not (tmp_path / "new").exists()


def test_what_is_factorised_already_is_refused_and_nothing_overwritten(tmp_path):
    source = write_checkpoint(tmp_path / "run", 1, {WEIGHT: gpt2_tensors()})
    write_factorised(source, tmp_path / "new", {"mlp": "butterfly"})
    with pytest.raises(UserError, match="has MLPs of kind butterfly already; give a checkpoint with dense ones"):
        write_factorised(find(tmp_path / "new"), tmp_path / "again", {"mlp": "low_rank", "mlp_rank": 3})
    with pytest.raises(UserError, match="exists; give another --out"):
        write_factorised(source, tmp_path / "new", {"mlp": "butterfly"})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "run"]
