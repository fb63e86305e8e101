"""Bad input: one line that names file and place, exit code 2, earlier output intact."""

from __future__ import annotations

import fcntl
import gzip
import json
import os
import pickle
import resource
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import zstandard

from megagpt.data.indexed import IndexedDataset, IndexedWriter
from megagpt.errors import UserError

ROOT = Path(__file__).parents[2]
GOOD_LINE = b'{"text": "good"}\n'


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """Output of an earlier run; `preprocess` checks that it survives."""
    with IndexedWriter(tmp_path / "out_text_document", np.uint16) as writer:
        writer.add_document(np.array([1, 2, 3]))
    return tmp_path / "out"


@pytest.fixture
def preprocess(run_tool, earlier: Path):
    """Run the tool over an input, to an output that exists and may be overwritten."""

    def run(source: Path, *options: object, tokenizer: tuple[object, ...] = ("bytes",)):
        before = _files(earlier.parent, "out_*")
        outcome = run_tool(
            "preprocess_data", "--input", source, "--output-prefix", earlier, "--overwrite", "--workers", 1,
            "--tokenizer", *tokenizer, *options,
        )  # fmt: skip
        if outcome.code:
            assert _files(earlier.parent, "out_*") == before
        return outcome

    return run


def _files(folder: Path, pattern: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob(pattern)}


def _tokens(prefix: Path) -> list[bytes]:
    dataset = IndexedDataset(f"{prefix}_text_document")
    return [bytes(dataset.get(i).astype(np.uint8)) for i in range(len(dataset))]


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
    "two documents on a line": (b'{"text": "a"} {"text": "b"}\n', ["line 1", "byte 14"]),
}  # fmt: skip


@pytest.mark.parametrize("case", JSON_LINES)
def test_json_lines(case: str, tmp_path: Path, preprocess) -> None:
    data, words = JSON_LINES[case]
    source = tmp_path / "in.jsonl"
    source.write_bytes(data)
    preprocess(source).refused(str(source), *words)


@pytest.mark.parametrize(
    "data",
    [
        b'{"text": "good"}',  # 2 no final newline
        b'\xef\xbb\xbf{"text": "good"}\n',  # 4 byte-order mark: stripped
        b'{"text": "good", "n": 1000000000000000000000000000000}\n',  # 11 large, but JSON
        b'{"text": "good", "inner": {"text": 1}, "b": "text"}\n',  # 12 not twice
        b'\r\n{"text": "good"}\r\n\n',
    ],
)
def test_json_lines_that_are_valid(data: bytes, tmp_path: Path, preprocess, earlier: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(data)
    preprocess(source).succeeded()
    assert _tokens(earlier) == [b"good"]


@pytest.mark.parametrize(("data", "at"), [(b"ab\xff", 2), (b"ab\x00", 2), ("ab".encode("utf-16"), 0)])
def test_text_files(data: bytes, at: int, tmp_path: Path, preprocess) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    preprocess(tmp_path / "a.txt").refused("a.txt", f"byte {at}", "UTF-8")


def test_a_long_line_and_a_bomb_are_refused_within_bounded_memory(tmp_path: Path) -> None:
    """6 and 13: a gibibyte on one line, which is a 1 MB gzip file."""
    source = tmp_path / "bomb.jsonl.gz"
    with gzip.open(source, "wb", compresslevel=1) as file:
        file.write(GOOD_LINE + b'{"text": "')
        for _ in range(1024):
            file.write(b"a" * (1 << 20))
    outcome = _tool(
        "--input", source, "--output-prefix", tmp_path / "out", "--tokenizer", "bytes",
        "--max-document-mb", 16, limits={resource.RLIMIT_DATA: 600 << 20},
    )  # fmt: skip
    assert outcome.returncode == 2, outcome.stderr
    assert outcome.stderr.startswith(f"error: {source}: line 2: ") and "--max-document-mb" in outcome.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_bomb_of_blank_lines_passes_in_bounded_memory(tmp_path: Path) -> None:
    source = tmp_path / "bomb.jsonl.zst"
    blank = zstandard.ZstdCompressor().compress(b"\n" * (64 << 20))
    source.write_bytes(zstandard.ZstdCompressor().compress(GOOD_LINE) + blank)
    outcome = _tool(
        "--input", source, "--output-prefix", tmp_path / "out", "--tokenizer", "bytes", "--workers", 1,
        limits={resource.RLIMIT_DATA: 600 << 20},
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr
    assert _tokens(tmp_path / "out") == [b"good"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(GOOD_LINE * 1000)[:-20]),
        ("a.jsonl.gz", gzip.compress(GOOD_LINE * 1000)[:-5] + b"12345"),
        ("a.jsonl.gz", GOOD_LINE),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress(GOOD_LINE * 1000)[:-5]),
        ("a.txt.zst", GOOD_LINE),
    ],
)
def test_truncated_and_damaged_archives(name: str, data: bytes, tmp_path: Path, preprocess) -> None:
    """14."""
    (tmp_path / name).write_bytes(data)
    preprocess(tmp_path / name).refused(name, "archive")


def test_what_is_no_file(tmp_path: Path, preprocess) -> None:
    """15."""
    os.mkfifo(tmp_path / "fifo.jsonl")
    preprocess(tmp_path / "fifo.jsonl").refused("fifo.jsonl", "regular file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    preprocess(tmp_path / "loop").refused("loop", "symbolic links")
    (tmp_path / "empty").mkdir()
    preprocess(tmp_path / "empty").refused("empty", "no files")
    preprocess(tmp_path / "missing.jsonl").refused("missing.jsonl", "No such file")


def test_a_folder_with_a_loop_is_walked_once(tmp_path: Path, preprocess, earlier: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("one")
    (folder / "again").symlink_to(folder)
    preprocess(folder).succeeded()
    assert _tokens(earlier) == [b"one"]


# Tokenizers


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD_LINE)
    return path


def _gpt2(vocab_file: Path, merge_file: Path) -> tuple[object, ...]:
    return ("gpt2", "--vocab-file", vocab_file, "--merge-file", merge_file)


def test_tokenizer_files_that_are_missing(source: Path, tmp_path: Path, preprocess, gpt2_files) -> None:
    """16."""
    missing = tmp_path / "none"
    for kind in ("hf", "sentencepiece"):
        preprocess(source, tokenizer=(kind, "--tokenizer-model", missing)).refused(str(missing), "No such file")
        preprocess(source, tokenizer=(kind,)).refused("--tokenizer-model")
    preprocess(source, tokenizer=("gpt2", "--vocab-file", gpt2_files[0])).refused("--merge-file")
    preprocess(source, tokenizer=_gpt2(missing, gpt2_files[1])).refused(str(missing))


def test_tokenizer_files_that_are_cut(
    source: Path, tmp_path: Path, preprocess, gpt2_files, hf_file, sentencepiece_file
) -> None:
    """17."""
    cut = tmp_path / "cut"
    cut.write_bytes(gpt2_files[0].read_bytes()[:-100])
    preprocess(source, tokenizer=_gpt2(cut, gpt2_files[1])).refused(str(cut), "line 1")
    cut.write_bytes(hf_file.read_bytes()[:-100])
    preprocess(source, tokenizer=("hf", "--tokenizer-model", cut)).refused(str(cut), "line ")
    cut.write_bytes(sentencepiece_file.read_bytes()[:1000])
    preprocess(source, tokenizer=("sentencepiece", "--tokenizer-model", cut)).refused(str(cut))


def _with(path: Path, change: Callable[[dict], None], target: Path) -> Path:
    values = json.loads(path.read_text())
    change(values)
    target.write_text(json.dumps(values))
    return target


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda v: v.update(a=v["b"]), ["'a'", "'b'"]),  # 18 duplicate ids
        (lambda v: v.update(a=2**31), ["'a'", str(2**31)]),  # 20 above int32
        (lambda v: v.update(a=-1), ["'a'", "-1"]),
        (lambda v: v.update(a="1"), ["'a'", "'1'"]),
        (lambda v: v.pop("a"), ["'a'"]),  # a byte without a token
    ],
)
def test_ids_of_a_vocabulary(change, words, source: Path, tmp_path: Path, preprocess, gpt2_files, hf_file) -> None:
    vocab = _with(gpt2_files[0], change, tmp_path / "vocab.json")
    preprocess(source, tokenizer=_gpt2(vocab, gpt2_files[1])).refused(str(vocab), *words)
    if len(words) == 2:
        model = _with(hf_file, lambda v: change(v["model"]["vocab"]), tmp_path / "tokenizer.json")
        preprocess(source, tokenizer=("hf", "--tokenizer-model", model)).refused(str(model), *words)


def test_a_token_that_is_written_twice(source: Path, tmp_path: Path, preprocess, gpt2_files) -> None:
    vocab = tmp_path / "vocab.json"
    vocab.write_bytes(gpt2_files[0].read_bytes().replace(b"{", b'{"a": 7777, ', 1))
    preprocess(source, tokenizer=_gpt2(vocab, gpt2_files[1])).refused(str(vocab), "'a'", "twice")


def test_merges_of_another_vocabulary(source: Path, tmp_path: Path, preprocess, gpt2_files) -> None:
    """19, in one tokenizer; across runs: test_tokenizer.py."""
    merges = tmp_path / "merges.txt"
    merges.write_bytes(gpt2_files[1].read_bytes() + "ł ł\n".encode())
    n_lines = merges.read_text().count("\n")
    preprocess(source, tokenizer=_gpt2(gpt2_files[0], merges)).refused(str(merges), f"line {n_lines}")


def test_no_end_of_text_token(source: Path, tmp_path: Path, preprocess, gpt2_files) -> None:
    """21."""
    vocab = _with(gpt2_files[0], lambda v: v.pop("<|endoftext|>"), tmp_path / "vocab.json")
    kind = _gpt2(vocab, gpt2_files[1])
    preprocess(source, "--append-eod", tokenizer=kind).refused("--append-eod", str(vocab))
    preprocess(source, tokenizer=kind).succeeded()


def test_remote_code_is_never_run(source: Path, tmp_path: Path, preprocess, hf_file) -> None:
    """22."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(hf_file.read_bytes())
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    preprocess(source, tokenizer=("hf", "--tokenizer-model", folder)).refused("tokenizer_config.json", "'auto_map'")
    preprocess(source, tokenizer=("hf", "--tokenizer-model", folder / "tokenizer.json")).succeeded()
    assert not (tmp_path / "ran").exists()


# .idx and .bin

U64 = "<Q"
S, D = 3, 4  # sequences and boundaries of dataset_prefix: lengths 6, 3, 5 as uint16
LENGTHS, POINTERS, BOUNDARIES = 34, 34 + 4 * S, 34 + 12 * S
INDEX = {
    "23 magic": (0, "<9s", b"TNTIDX\0\0\0", ["byte 0"]),
    "24 version": (9, U64, 2, ["byte 9", "version 2"]),
    "25 dtype code": (17, "<B", 9, ["byte 17", "code 9"]),
    "25 a float": (17, "<B", 7, ["byte 17", "code 7"]),
    "26 count 2^63": (18, U64, 2**63, ["byte 18", str(2**63)]),
    "27 count times size overflow": (18, U64, 2**62 + 3, ["byte 18"]),
    "27 boundaries overflow": (26, U64, 2**61 + 4, ["byte 18"]),
    "28 negative length": (LENGTHS + 4, "<i", -3, [f"byte {LENGTHS + 4}", "sequence 1", "-3"]),
    "29 pointer past the end": (POINTERS + 16, "<q", 10**9, [f"byte {POINTERS + 16}", str(10**9)]),
    "30 pointers unlike lengths": (POINTERS + 8, "<q", 10, [f"byte {POINTERS + 8}", "byte 10", "12"]),
    "31 boundaries unsorted": (BOUNDARIES + 16, "<q", 0, [f"byte {BOUNDARIES + 16}"]),
    "31 first boundary": (BOUNDARIES, "<q", 1, [f"byte {BOUNDARIES}", "0 to 3"]),
    "31 last boundary": (BOUNDARIES + 24, "<q", 2, [f"byte {BOUNDARIES}", "0 to 3"]),
}  # fmt: skip


@pytest.mark.parametrize("case", INDEX)
def test_index(case: str, dataset_prefix: str, run_tool) -> None:
    at, form, value, words = INDEX[case]
    Path(f"{dataset_prefix}.json").unlink()  # its hash would tell first
    idx = Path(f"{dataset_prefix}.idx")
    data = bytearray(idx.read_bytes())
    struct.pack_into(form, data, at, value)
    idx.write_bytes(data)
    run_tool("inspect_data", dataset_prefix, "--verify").refused(str(idx), *words)


@pytest.mark.parametrize(
    ("suffix", "change", "words"),
    [
        (".idx", lambda data: data[:20], ["20 bytes"]),
        (".idx", lambda data: data[:-1], ["byte 18"]),
        (".bin", lambda data: data[:-2], ["too short", "26 bytes"]),  # 32
        (".bin", lambda data: data + b"\0\0", ["too long", "30 bytes"]),  # 33
        (".idx", lambda data: data + b"\0", ["byte 102", "1 bytes too many"]),  # 34
        (".idx", lambda data: data + b"\0" * S, ["byte 102", "multimodal"]),  # 34, or modes
    ],
)
def test_sizes(suffix: str, change, words: list[str], dataset_prefix: str, run_tool) -> None:
    Path(f"{dataset_prefix}.json").unlink()
    path = Path(f"{dataset_prefix}{suffix}")
    path.write_bytes(change(path.read_bytes()))
    run_tool("inspect_data", dataset_prefix).refused(str(path), *words)


def test_a_missing_half(dataset_prefix: str, run_tool) -> None:
    Path(f"{dataset_prefix}.idx").rename(f"{dataset_prefix}.hidden")
    run_tool("inspect_data", dataset_prefix).refused(f"{dataset_prefix}.idx", "not there")
    os.mkfifo(f"{dataset_prefix}.idx")
    run_tool("inspect_data", dataset_prefix).refused(f"{dataset_prefix}.idx", "regular file")


def test_token_beyond_the_vocabulary(dataset_prefix: str, run_tool) -> None:
    """35: the eighth token, byte 14, lies in sequence 1."""
    path = Path(f"{dataset_prefix}.bin")
    tokens = np.fromfile(path, np.uint16)
    tokens[7] = 300
    tokens.tofile(path)
    run_tool("inspect_data", dataset_prefix, "--verify").refused(str(path), "byte 14", "token 300", "sequence 1", "257")
    Path(f"{dataset_prefix}.json").unlink()
    run_tool("inspect_data", dataset_prefix, "--verify").succeeded()  # nothing says how large the vocabulary is
    run_tool("inspect_data", dataset_prefix, "--verify", "--vocab-size", 300).refused("byte 14", "token 300")


def test_index_of_another_bin(dataset_prefix: str, tmp_path: Path, run_tool) -> None:
    """36: same sizes, other documents; only the recorded hashes can tell."""
    with IndexedWriter(tmp_path / "other", np.uint16) as writer:
        for length in (3, 6, 5):
            writer.add_document(np.arange(length))
    idx, bin_file = Path(f"{dataset_prefix}.idx"), Path(f"{dataset_prefix}.bin")
    good = idx.read_bytes()
    idx.write_bytes((tmp_path / "other.idx").read_bytes())
    run_tool("inspect_data", dataset_prefix).refused(str(idx), "SHA-256")
    idx.write_bytes(good)
    bin_file.write_bytes((tmp_path / "other.bin").read_bytes())
    run_tool("inspect_data", dataset_prefix, "--verify").refused(str(bin_file), "SHA-256")


SIDE_FILES = {
    "cut": (lambda data: data[:20], ["line 2"]),
    "empty": (lambda data: b"", ["line 1"]),
    "no object": (lambda data: b"[]", ["list"]),
    "another type": (lambda data: data.replace(b"257", b'"257"'), ["'vocab_size'", "'257'", "int"]),
    "a key missing": (lambda data: data.replace(b"vocab_size", b"vocab-size"), ["'vocab_size' is missing"]),
    "an unknown key": (lambda data: data.replace(b"{", b'{"x": 1, ', 1), ["unknown key 'x'"]),
    "another value": (lambda data: data.replace(b"257", b"258"), ["'json_sha256'"]),
    "not UTF-8": (lambda data: b"\xff" + data, ["byte 0", "UTF-8"]),
    "nesting": (lambda data: b"[" * 100_000, ["JSON"]),
    "a huge integer": (lambda data: b"1" * 100_000, ["JSON"]),
    "too large": (lambda data: data + b" " * (2 << 20), ["1048576 bytes"]),
}


@pytest.mark.parametrize("case", SIDE_FILES)
def test_side_file(case: str, dataset_prefix: str, run_tool) -> None:
    change, words = SIDE_FILES[case]
    side = Path(f"{dataset_prefix}.json")
    side.write_bytes(change(side.read_bytes()))
    run_tool("inspect_data", dataset_prefix).refused(f"{side}: ", *words)


def test_a_side_file_that_is_no_file(dataset_prefix: str, run_tool) -> None:
    side = Path(f"{dataset_prefix}.json")
    side.unlink()
    os.mkfifo(side)
    run_tool("inspect_data", dataset_prefix).refused(f"{side}: not a regular file")
    side.unlink()
    side.symlink_to(side)
    run_tool("inspect_data", dataset_prefix).refused(f"{side}: ", "symbolic links")


def test_bin_that_shrinks_while_open(dataset_prefix: str) -> None:
    """37: an error that can be caught; through a memory map it would be SIGBUS."""
    dataset = IndexedDataset(dataset_prefix)
    os.truncate(f"{dataset_prefix}.bin", 14)
    assert dataset.get(0).tolist() == [*b"hello", 256]
    with pytest.raises(UserError, match=r"\.bin: ends at byte 14"):
        dataset.get(2)


class _Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_a_pickled_cache_is_not_opened(dataset_prefix: str, tmp_path: Path, run_tool) -> None:
    """38: there are no caches of that kind; a planted one is not even looked at."""
    trap = np.array([_Payload(tmp_path / "ran")], dtype=object)
    for name in (".npy", ".idx.npy", "_document_index.npy"):
        with open(dataset_prefix + name, "wb") as file:
            pickle.dump(trap, file)
    run_tool("inspect_data", dataset_prefix, "--sample", 0, "--seq-len", 4, "--split", "1").succeeded()
    run_tool("inspect_data", dataset_prefix, "--verify").succeeded()
    assert not (tmp_path / "ran").exists()


# 50: output


def _tool(*args: object, limits: dict[int, int]) -> subprocess.CompletedProcess[str]:
    """The real command under resource limits."""

    def limit() -> None:
        for name, value in limits.items():
            resource.setrlimit(name, (value, value))

    command = [sys.executable, str(ROOT / "tools" / "preprocess_data.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit)


@pytest.mark.parametrize("workers", [1, 2])
def test_disk_full(workers: int, tmp_path: Path, earlier: Path) -> None:
    """A limit on the file size stands in for the full disk: write() fails in the same way."""
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "' + "a" * 3_000_000 + '"}\n')
    before = _files(tmp_path, "out_*")
    outcome = _tool(
        "--input", source, "--output-prefix", earlier, "--tokenizer", "bytes", "--overwrite",
        "--workers", workers, limits={resource.RLIMIT_FSIZE: 1_000_000},
    )  # fmt: skip
    assert outcome.returncode == 2
    assert outcome.stderr.startswith("error: ") and outcome.stderr.count("\n") == 1, outcome.stderr
    assert "out_text_document.bin.partial: cannot be written (File too large)" in outcome.stderr
    assert _files(tmp_path, "out_*") == before


def test_output_that_exists(source: Path, earlier: Path, run_tool) -> None:
    before = _files(earlier.parent, "out_*")
    args = ("preprocess_data", "--input", source, "--output-prefix", earlier, "--tokenizer", "bytes")
    run_tool(*args).refused("out_text_document.bin", "exists", "--overwrite")
    assert _files(earlier.parent, "out_*") == before
    run_tool(*args, "--overwrite").succeeded()
    assert _tokens(earlier) == [b"good"]


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
