"""Output that cannot be written (50): one line says so, what was there stays valid, nothing is left behind."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megagpt.data.indexed.dataset import IndexedDataset
from tests.bad_inputs import GOOD_LINE, contents

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.bad_input(50)


def _tool(*args: object, limits: dict[int, int] | None = None) -> subprocess.CompletedProcess[str]:
    """The real command, under resource limits."""

    def limit() -> None:
        for name, value in (limits or {}).items():
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


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_output_that_is_a_folder(suffix: str, source: Path, earlier: Path, preprocess) -> None:
    """It cannot be replaced: told at the start, not when a part of the dataset has been replaced."""
    Path(f"{earlier}_text_document{suffix}").unlink(missing_ok=True)
    Path(f"{earlier}_text_document{suffix}").mkdir()
    preprocess(source).refused(f"out_text_document{suffix}", "is no file")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if (
        os.geteuid()
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=False).returncode
    ):
        pytest.skip("only root, outside a closed container, may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_real_full_disk_at_every_point(small_disk: Path, run_tool) -> None:
    """From no page free to enough: each time the old dataset is there and nothing else; then the new one is."""
    source = small_disk.parent / "in.jsonl"
    source.write_bytes(GOOD_LINE * 2000)
    args = ("preprocess_data", "--input", source, "--output-prefix", small_disk / "out", "--tokenizer", "bytes")
    run_tool(*args, "--append-eod").succeeded()
    (small_disk / "filler").write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
    before = contents(small_disk, "out_*")
    for n_free in range(40):
        outcome = run_tool(*args, "--workers", 1, "--overwrite")
        if outcome.code == 0:
            break
        outcome.refused("out_text_document", "No space left on device", "Nothing that was there before has changed")
        assert contents(small_disk, "out_*") == before
        if n_free == 8:
            parallel = _tool(*args[1:], "--workers", 2, "--overwrite")
            assert parallel.returncode == 2 and parallel.stderr.count("\n") == 1, parallel.stderr
            assert contents(small_disk, "out_*") == before
        os.truncate(small_disk / "filler", (small_disk / "filler").stat().st_size - 4096)
    assert 10 < n_free < 39
    assert len(IndexedDataset(small_disk / "out_text_document")) == 2000
    assert len(contents(small_disk, "out_*")) == 3


def test_a_disk_that_is_mounted_read_only(small_disk: Path, source: Path, run_tool) -> None:
    args = ("preprocess_data", "--input", source, "--output-prefix", small_disk / "out", "--tokenizer", "bytes")
    run_tool(*args).succeeded()
    before = contents(small_disk, "*")
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run_tool(*args, "--overwrite").refused("out_text_document", "Read-only file system", "Nothing that was there")
    assert contents(small_disk, "*") == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_ended(number: signal.Signals, earlier: Path, tmp_path: Path) -> None:
    """The old dataset stays; no worker goes on; what is left is nothing, or (kill -9) what the next run replaces."""
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD_LINE * 1_500_000)
    before = contents(tmp_path, "out_*")
    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), "--input", str(source), "--workers", "2"]
    command += ["--output-prefix", str(earlier), "--tokenizer", "bytes", "--overwrite"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        partial = Path(f"{earlier}_text_document.bin.partial")
        _until(lambda: partial.exists() and partial.stat().st_size > 0)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == (143 if number == signal.SIGTERM else -number)
    assert len(workers) >= 2
    _until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers))
    after = contents(tmp_path, "out_*")
    if number == signal.SIGKILL:
        after = {name: data for name, data in after.items() if not name.endswith(".partial")}
    assert after == before


def _until(condition, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
