"""Bad .idx, .bin and .json: one line with file and byte, in the tool and in training. Numbers: tests/bad_inputs.py."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from megagpt.data.indexed.dataset import IndexedDataset, IndexedWriter
from megagpt.errors import UserError
from tests.bad_inputs import numbered

ROOT = Path(__file__).parents[2]

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


@pytest.mark.parametrize("case", numbered(INDEX))
def test_index(case: str, dataset_prefix: str, open_dataset) -> None:
    at, form, value, words = INDEX[case]
    Path(f"{dataset_prefix}.json").unlink()  # its hash would tell first
    idx = Path(f"{dataset_prefix}.idx")
    data = bytearray(idx.read_bytes())
    struct.pack_into(form, data, at, value)
    idx.write_bytes(data)
    open_dataset(dataset_prefix).refused(str(idx), *words)


SIZES = {
    "23 cut in the header": (".idx", lambda data: data[:20], ["20 bytes"]),
    "26 one byte less than announced": (".idx", lambda data: data[:-1], ["byte 18"]),
    "32 too short": (".bin", lambda data: data[:-2], ["too short", "26 bytes"]),
    "33 too long": (".bin", lambda data: data + b"\0\0", ["too long", "30 bytes"]),
    "34 trailing byte": (".idx", lambda data: data + b"\0", ["byte 102", "1 bytes too many"]),
    "34 trailing bytes, or modes": (".idx", lambda data: data + b"\0" * S, ["byte 102", "multimodal"]),
}  # fmt: skip


@pytest.mark.parametrize("case", numbered(SIZES))
def test_sizes(case: str, dataset_prefix: str, open_dataset) -> None:
    suffix, change, words = SIZES[case]
    Path(f"{dataset_prefix}.json").unlink()
    path = Path(f"{dataset_prefix}{suffix}")
    path.write_bytes(change(path.read_bytes()))
    open_dataset(dataset_prefix).refused(str(path), *words)


def test_a_missing_half(dataset_prefix: str, open_dataset) -> None:
    Path(f"{dataset_prefix}.idx").rename(f"{dataset_prefix}.hidden")
    open_dataset(dataset_prefix).refused(f"{dataset_prefix}.idx", "not there")
    os.mkfifo(f"{dataset_prefix}.idx")
    open_dataset(dataset_prefix).refused(f"{dataset_prefix}.idx", "regular file")


@pytest.mark.bad_input(35)
def test_token_beyond_the_vocabulary(dataset_prefix: str, run_tool) -> None:
    """The eighth token, byte 14, lies in sequence 1."""
    path = Path(f"{dataset_prefix}.bin")
    tokens = np.fromfile(path, np.uint16)
    tokens[7] = 300
    tokens.tofile(path)
    run_tool("inspect_data", dataset_prefix, "--verify").refused(str(path), "byte 14", "token 300", "sequence 1", "257")
    Path(f"{dataset_prefix}.json").unlink()
    run_tool("inspect_data", dataset_prefix, "--verify").succeeded()  # nothing says how large the vocabulary is
    run_tool("inspect_data", dataset_prefix, "--verify", "--vocab-size", 300).refused("byte 14", "token 300")


@pytest.mark.bad_input(36)
def test_index_of_another_bin(dataset_prefix: str, tmp_path: Path, run_tool, run_training) -> None:
    """Same sizes, other documents; only the recorded hashes can tell."""
    with IndexedWriter(tmp_path / "other", np.uint16) as writer:
        for length in (3, 6, 5):
            writer.add_document(np.arange(length))
    idx, bin_file = Path(f"{dataset_prefix}.idx"), Path(f"{dataset_prefix}.bin")
    good = idx.read_bytes()
    idx.write_bytes((tmp_path / "other.idx").read_bytes())
    run_tool("inspect_data", dataset_prefix).refused(str(idx), "SHA-256")
    run_training("--data-path", dataset_prefix).refused(str(idx), "SHA-256")
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
def test_side_file(case: str, dataset_prefix: str, open_dataset) -> None:
    change, words = SIDE_FILES[case]
    side = Path(f"{dataset_prefix}.json")
    side.write_bytes(change(side.read_bytes()))
    open_dataset(dataset_prefix).refused(f"{side}: ", *words)


def test_a_side_file_that_is_no_file(dataset_prefix: str, open_dataset) -> None:
    side = Path(f"{dataset_prefix}.json")
    side.unlink()
    os.mkfifo(side)
    open_dataset(dataset_prefix).refused(f"{side}: not a regular file")
    side.unlink()
    side.symlink_to(side)
    open_dataset(dataset_prefix).refused(f"{side}: ", "symbolic links")


@pytest.mark.bad_input(37)
def test_bin_that_shrinks_while_open(dataset_prefix: str) -> None:
    """An error that can be caught; through a memory map it would be SIGBUS."""
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


@pytest.mark.bad_input(38)
def test_a_pickled_cache_is_not_opened(dataset_prefix: str, tmp_path: Path, run_tool, run_training) -> None:
    """There are no caches of that kind; a planted one is not even looked at."""
    trap = np.array([_Payload(tmp_path / "ran")], dtype=object)
    for name in (".npy", ".idx.npy", "_document_index.npy"):
        with open(dataset_prefix + name, "wb") as file:
            pickle.dump(trap, file)
    run_tool("inspect_data", dataset_prefix, "--sample", 0, "--seq-len", 4, "--split", "1").succeeded()
    run_tool("inspect_data", dataset_prefix, "--verify").succeeded()
    assert run_training("--data-path", dataset_prefix).code == -1
    assert not (tmp_path / "ran").exists()
