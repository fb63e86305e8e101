"""Output that cannot be written (50): one line says so, what was there stays valid, nothing is left behind."""

from __future__ import annotations

import fcntl
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megagpt.data.indexed import IndexedDataset
from tests.bad_inputs import GOOD_LINE, contents

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.bad_input(50)


def _tool(*args: object, limits: dict[int, int]) -> subprocess.CompletedProcess[str]:
    """The real command under resource limits."""

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(name, (value, value))

    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit)


def _first(prefix: Path) -> bytes:
    return bytes(IndexedDataset(f"{prefix}_text_document").get(0).astype("u1"))


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_full(workers: int, tmp_path: Path, earlier: Path) -> None:
    """A limit on the file size stands in for the full disk: write() fails in the same way."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "' + "a" * 3_000_000 + '"}\n')
    before = contents(tmp_path, "out_*")
    outcome = _tool(
        "--input", source, "--output-prefix", earlier, "--tokenizer", "bytes", "--overwrite",
        "--workers", workers, limits={resource.RLIMIT_FSIZE: 1_000_000},
    )  # fmt: skip
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1, outcome.stderr
    assert "out_text_document.bin.partial: cannot be written (File too large)" in outcome.stderr
    assert contents(tmp_path, "out_*") == before


def test_output_that_exists(source: Path, earlier: Path, run_tool) -> None:
    before = contents(earlier.parent, "out_*")
    args = ("preprocess_data", "--input", source, "--output-prefix", earlier, "--tokenizer", "bytes")
    run_tool(*args).refused("out_text_document.bin", "exists", "--overwrite")
    assert contents(earlier.parent, "out_*") == before
    run_tool(*args, "--overwrite").succeeded()
    assert _first(earlier) == b"good"


def test_output_that_is_locked(source: Path, earlier: Path, preprocess) -> None:
    with open(f"{earlier}_text_document.idx.partial", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        preprocess(source).refused("out_text_document.idx.partial", "locked")
    preprocess(source).succeeded()  # what a killed writer leaves behind does not hinder
    assert not list(earlier.parent.glob("*.partial"))


def test_output_that_is_read_only(run_tool) -> None:
    """Root may write anywhere, so the tool runs as nobody for once."""
    with tempfile.TemporaryDirectory() as name:  # where another user may look, unlike tmp_path
        folder = Path(name)
        (folder / "in.jsonl").write_bytes(GOOD_LINE)
        args = ("preprocess_data", "--input", folder / "in.jsonl", "--tokenizer", "bytes", "--output-prefix")
        run_tool(*args, folder / "first").succeeded()  # loads what nobody may not be allowed to read
        for file in folder.glob("first*"):
            file.unlink()
        folder.chmod(0o555)
        with _as_nobody():
            outcome = run_tool(*args, folder / "out")
        outcome.refused(f"{folder}/out_text_document.idx.partial", "Permission denied")
        assert os.listdir(folder) == ["in.jsonl"]
        folder.chmod(0o755)


@contextmanager
def _as_nobody() -> Iterator[None]:
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        yield
    finally:
        os.seteuid(user)


def test_output_below_a_file(source: Path, run_tool) -> None:
    args = ("--input", source, "--output-prefix", source / "out", "--tokenizer", "bytes")
    run_tool("preprocess_data", *args).refused(str(source), "cannot be written")
