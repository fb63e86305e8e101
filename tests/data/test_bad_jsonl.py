"""Bad text: one line that names file and place, exit code 2, earlier output intact. Numbers: tests/bad_inputs.py."""

from __future__ import annotations

import gzip
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import zstandard

from megagpt.data.indexed.dataset import IndexedDataset
from tests.bad_inputs import GOOD_LINE, numbered

ROOT = Path(__file__).parents[2]
MEMORY = 600 << 20


def _tokens(prefix: Path) -> list[bytes]:
    dataset = IndexedDataset(f"{prefix}_text_document")
    return [bytes(dataset.get(i).astype("u1")) for i in range(len(dataset))]


JSON_LINES = {
    "1 empty file": (b"", ["empty"]),
    "1 blank lines only": (b"\n  \n", ["no text"]),
    "3 invalid UTF-8": (GOOD_LINE + b'{"text": "\xff"}\n', ["line 2", "byte 10", "UTF-8"]),
    "5 NUL byte": (GOOD_LINE + b'{"text": "a\x00b"}\n', ["line 2", "byte 11"]),
    "5 a hole of NUL bytes": (GOOD_LINE + b"\x00" * 100, ["line 2", "byte 0"]),
    "7 nesting": (GOOD_LINE + b'{"text": ' + b"[" * 100_000 + b"\n", ["line 2", "depth"]),
    "7 nesting in another key": (b'{"text": "a", "b": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", ["depth"]),
    "8 key missing": (GOOD_LINE + b'{"texts": "a"}\n', ["line 2", "'text'", "'texts'", "--json-keys"]),
    "9 number": (b'{"text": 5}\n', ["line 1", "'text'", "5", "string"]),
    "9 null": (b'{"text": null}\n', ["line 1", "'text'", "None"]),
    "9 list": (b'{"text": ["a", "b"]}\n', ["line 1", "'text'"]),
    "9 no object": (b'["text"]\n', ["line 1", "list"]),
    "10 lone surrogate": (b'{"text": "\\ud800"}\n', ["line 1", "surrogate"]),
    "10 lone surrogate as bytes": (b'{"text": "\xed\xa0\x80"}\n', ["line 1", "byte 10", "UTF-8"]),
    "11 NaN": (b'{"text": "a", "score": NaN}\n', ["line 1", "byte 23"]),
    "11 huge integer": (b'{"text": "a", "n": 1' + b"0" * 5000 + b"}\n", ["line 1", "byte 19"]),
    "12 duplicate key": (GOOD_LINE + b'{"text": "a", "text": "b"}\n', ["line 2", "'text'", "twice"]),
    "12 duplicate key, escaped": (b'{"text": "a", "t\\u0065xt": "b"}\n', ["line 1", "'text'", "twice"]),
    "12 two documents on a line": (b'{"text": "a"} {"text": "b"}\n', ["line 1", "byte 14"]),
}  # fmt: skip


@pytest.mark.parametrize("case", numbered(JSON_LINES))
def test_json_lines(case: str, tmp_path: Path, preprocess) -> None:
    data, words = JSON_LINES[case]
    source = tmp_path / "in.jsonl"
    source.write_bytes(data)
    preprocess(source).refused(str(source), *words)


VALID = {
    "2 no final newline": b'{"text": "good"}',
    "4 byte-order mark: stripped": b'\xef\xbb\xbf{"text": "good"}\n',
    "7 nested 1,000 deep": b'{"text": "good", "inner": [' + b"[" * 1000 + b'"text"' + b"]" * 1000 + b"]}\n",
    "11 large, but JSON": b'{"text": "good", "n": 1000000000000000000000000000000}\n',
    "12 not twice": b'{"text": "good", "inner": {"text": 1}, "b": "text"}\n',
    "12 not twice, escaped": b'{"text": "good", "inner": "\\u003c{\\"text\\": 1}"}\n',
    "1 empty lines": b'\r\n{"text": "good"}\r\n\n',
}


@pytest.mark.parametrize("case", numbered(VALID))
def test_json_lines_that_are_valid(case: str, tmp_path: Path, preprocess, earlier: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(VALID[case])
    preprocess(source).succeeded()
    assert _tokens(earlier) == [b"good"]


@pytest.mark.bad_input(3, 5)
@pytest.mark.parametrize(("data", "at"), [(b"ab\xff", 2), (b"ab\x00", 2), ("ab".encode("utf-16"), 0)])
def test_text_files(data: bytes, at: int, tmp_path: Path, preprocess) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    preprocess(tmp_path / "a.txt").refused("a.txt", f"byte {at}", "UTF-8")


@pytest.mark.bad_input(6, 13)
def test_a_long_line_and_a_bomb_are_refused_within_bounded_memory(tmp_path: Path) -> None:
    """A gibibyte on one line, which is a 1 MB gzip file."""
    source = tmp_path / "bomb.jsonl.gz"
    with gzip.open(source, "wb", compresslevel=1) as file:
        file.write(GOOD_LINE + b'{"text": "')
        for _ in range(1024):
            file.write(b"a" * (1 << 20))
    outcome = _limited(
        "--input", source, "--output-prefix", tmp_path / "out", "--tokenizer", "bytes",
        "--max-document-mb", 16,
    )  # fmt: skip
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr.startswith(f"error: {source}: line 2: ") and "--max-document-mb" in outcome.stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.bad_input(13)
def test_a_bomb_of_blank_lines_passes_in_bounded_memory(tmp_path: Path) -> None:
    source = tmp_path / "bomb.jsonl.zst"
    blank = zstandard.ZstdCompressor().compress(b"\n" * (64 << 20))
    source.write_bytes(zstandard.ZstdCompressor().compress(GOOD_LINE) + blank)
    outcome = _limited(
        "--input", source, "--output-prefix", tmp_path / "out", "--tokenizer", "bytes", "--workers", 1,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert _tokens(tmp_path / "out") == [b"good"]


@pytest.mark.bad_input(14)
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(GOOD_LINE * 1000, mtime=0)[:-20]),
        ("a.jsonl.gz", gzip.compress(GOOD_LINE * 1000, mtime=0)[:-5] + b"12345"),
        ("a.jsonl.gz", GOOD_LINE),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(GOOD_LINE * 1000)[:-5]),
        ("a.txt.zst", GOOD_LINE),
    ],
)
def test_truncated_and_damaged_archives(name: str, data: bytes, tmp_path: Path, preprocess) -> None:
    (tmp_path / name).write_bytes(data)
    preprocess(tmp_path / name).refused(name, "archive")


@pytest.mark.bad_input(15)
def test_what_is_no_file(tmp_path: Path, preprocess) -> None:
    os.mkfifo(tmp_path / "fifo.jsonl")
    preprocess(tmp_path / "fifo.jsonl").refused("fifo.jsonl", "regular file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    preprocess(tmp_path / "loop").refused("loop", "symbolic links")
    (tmp_path / "empty").mkdir()
    preprocess(tmp_path / "empty").refused("empty", "no files")
    preprocess(tmp_path / "missing.jsonl").refused("missing.jsonl", "No such file")


@pytest.mark.bad_input(15)
def test_a_folder_with_a_loop_is_walked_once(tmp_path: Path, preprocess, earlier: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "again").symlink_to(folder)
    preprocess(folder).succeeded()
    assert _tokens(earlier) == [b"one"]


def test_a_folder_that_may_not_be_read(tmp_path: Path, preprocess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not passed over: the text in it would be missing without a word. (Root may read all: so scandir refuses.)"""
    (tmp_path / "texts" / "closed").mkdir(parents=True)
    (tmp_path / "texts" / "a.txt").write_text("one")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    preprocess(tmp_path / "texts").refused(f"{tmp_path}/texts/closed", "Permission denied")


def _limited(*args: object) -> subprocess.CompletedProcess[str]:
    """The real command with little memory."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))

    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit)
