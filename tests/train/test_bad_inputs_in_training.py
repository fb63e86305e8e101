"""Bad inputs that training meets once it runs, or on several ranks: the program in processes of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megagpt.checkpoint.folders import pointed
from megagpt.checkpoint.state import read_state
from megagpt.cli import parse_run_config
from megagpt.data.indexed.dataset import IndexedDataset, IndexedWriter, verify
from megagpt.errors import UserError

ROOT = Path(__file__).parents[2]
PROGRAM = str(ROOT / "examples" / "pretrain_gpt.py")
SMALL = (
    "--n-layers=1", "--d-model=16", "--n-heads=2", "--seq-len=8", "--vocab-size=257", "--global-batch-size=4",
    "--eval-steps=0",
)  # fmt: skip
pytestmark = pytest.mark.timeout(150)  # a start of two ranks takes long on a busy machine

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def run_program(tmp_path: Path) -> Iterator[Start]:
    """run_program("python", "--seq-len", 8) -> the running program; it is ended with the test."""
    started = []

    def run(launcher: str, *args: object) -> subprocess.Popen[str]:
        command = [sys.executable] if launcher == "python" else [sys.executable, "-m", *launcher.split()]
        environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
        process = subprocess.Popen(
            [*command, PROGRAM, *SMALL, *map(str, args)],
            env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.terminate()  # torchrun ends its ranks, which a kill would leave behind
        try:
            process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """A prefix: 100 documents of 16 bytes."""
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        for i in range(100):
            writer.add_document(np.arange(i, i + 16))
    return str(tmp_path / "data")


def refused(process: subprocess.Popen[str], *words: str) -> None:
    """Exit code 2, and one line on stderr that holds all the words; the rest is the launcher's own."""
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0, out
    if "torch" not in str(process.args):
        assert process.returncode == 2 and err.count("\n") == 1, (process.returncode, err)
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, err
    for word in words:
        assert word in errors[0]
    assert not re.search(r'File ".*megagpt', err), err


@pytest.mark.bad_input(35)
def test_a_token_beyond_the_vocabulary(dataset: str, run_program: Start) -> None:
    tokens = np.memmap(f"{dataset}.bin", np.uint16, "r+")
    tokens[:1500] = 300
    tokens.flush()
    refused(run_program("python", "--data-path", dataset), "token 300", "257", "inspect_data.py --verify")
    with pytest.raises(UserError, match="byte 0: token 300 of sequence 0"):
        verify(IndexedDataset(dataset), 257)  # what --data.verify does


@pytest.mark.bad_input(37)
def test_a_bin_that_is_cut_while_training_reads_it(dataset: str, run_program: Start) -> None:
    process = run_program("python", "--data-path", dataset, "--train-steps", 100_000)
    assert process.stdout is not None
    for line in process.stdout:
        if " step 1/" in line:
            break
    os.truncate(f"{dataset}.bin", 0)
    refused(process, f"{dataset}.bin: ends at byte 0", "preprocess_data.py")


def test_a_run_that_has_diverged_still_saves(dataset: str, run_program: Start, tmp_path: Path) -> None:
    diverge = "--lr=1e25", "--warmup-steps=0", "--clip=0", "--train-steps=2"
    process = run_program("python", "--data-path", dataset, "--split=1,1", "--eval-steps=1", "--save=run", *diverge)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "validation loss nan" in out, (out, err)
    saved = read_state(pointed(tmp_path / "run"))
    assert saved.step == 2 and saved.validation_loss is None


@pytest.mark.bad_input(23)
def test_a_damaged_index_is_told_once_by_two_ranks(dataset: str, run_program: Start) -> None:
    with open(f"{dataset}.idx", "r+b") as file:
        file.write(b"X")
    process = run_program("torch.distributed.run --nproc-per-node 2 --standalone", "--tp", 2, "--data-path", dataset)
    refused(process, f"{dataset}.idx: byte 0")


@pytest.mark.bad_input(49)
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {n_layer: 2}", ["model.n_layer", "did you mean"]),
        ("model: !!python/name:os.system", ["run.yaml:1", "python"]),
        ("optim: {lr: .nan}", ["optim.lr", "nan"]),
        ("optim: {weight_decay: -1}", ["optim.weight_decay=-1"]),
    ],
)
def test_a_bad_configuration(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as refused:
        parse_run_config(["--config", str(tmp_path / "run.yaml")])
    assert "\n" not in str(refused.value) and all(word in str(refused.value) for word in words), refused.value


@pytest.mark.bad_input(49)
def test_a_bad_configuration_ends_the_program(tmp_path: Path, run_program: Start) -> None:
    (tmp_path / "run.yaml").write_text("model: {n_layer: 2}")
    refused(run_program("python", "--config", tmp_path / "run.yaml"), "model.n_layer", "did you mean")
