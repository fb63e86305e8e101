"""What a fuzzer feeds: readers of files, of the command line and of a port, each with a folder to write into.

A target returns, or raises UserError inside and swallows it; any other exception is a finding, and so is a result that
another reader of the same bytes does not give. test_fuzz.py feeds them with Hypothesis, `make fuzz` guided by coverage.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np

from megagpt.cli import parse_run_config, read_config, to_yaml
from megagpt.cli.yaml_file import read_yaml
from megagpt.data.indexed.dataset import IndexedDataset, verify
from megagpt.data.text.documents import find_inputs, read_blocks, texts
from megagpt.data.text.packed import packing
from megagpt.errors import UserError
from megagpt.processes.watch.door import Door
from megagpt.processes.watch.wire import Wire

Target = Callable[[bytes, Path], None]
MAX_DOCUMENT_BYTES = 1 << 20
TOKEN = "secret"
HELLO = b'{"token": "secret", "number": 1, "host": "a", "pid": 3}\n'
NAMES = ("a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.txt.gz", "packed.jsonl.gz")


def fuzz_index(data: bytes, folder: Path) -> None:
    """The first 4 bytes: the size of the .bin; the rest: the .idx."""
    bin_size = int.from_bytes(data[:4], "little") % (1 << 16)
    (folder / "a.bin").write_bytes(bytes(i % 251 for i in range(bin_size)))
    (folder / "a.idx").write_bytes(data[4:])
    (folder / "a.json").unlink(missing_ok=True)
    try:
        dataset = IndexedDataset(folder / "a")
    except UserError as error:
        _is_good_message(error, folder)
        return
    _check_index(dataset, data[4:], bin_size)
    with contextlib.suppress(UserError):
        verify(IndexedDataset(folder / "a"), 50_000)


def fuzz_side_file(data: bytes, folder: Path) -> None:
    """The bytes of P.json beside a dataset that is whole."""
    if not (folder / "b.idx").exists():
        (folder / "b.idx").write_bytes(struct.pack("<9sQBQQiqqq", b"MMIDIDX\0\0", 1, 8, 1, 2, 2, 0, 0, 1))
        (folder / "b.bin").write_bytes(b"\1\0\2\0")
    (folder / "b.json").write_bytes(data)
    try:
        IndexedDataset(folder / "b")
    except UserError as error:
        _is_good_message(error, folder)
    else:
        raise AssertionError("a side file with the hash of this index came out of nothing")


def fuzz_jsonl(data: bytes, folder: Path) -> None:
    """The first byte: the name, thus the format; the rest: the file, packed once more where the name says so."""
    name = NAMES[data[0] % len(NAMES)] if data else NAMES[0]
    content = data[1:]
    path = folder / name
    path.write_bytes(gzip.compress(content, 1) if name.startswith("packed") else content)
    try:
        blocks = read_blocks(find_inputs([path]), MAX_DOCUMENT_BYTES)
        found = [text for block in blocks for (text,) in texts(block, ["text"])]
    except UserError as error:
        _is_good_message(error, folder)
        return
    if name in ("a.jsonl", "a.txt") and packing(content):
        return  # told by its first bytes, not by its name
    if name in ("a.jsonl", "packed.jsonl.gz"):
        with contextlib.suppress(RecursionError):  # Python's parser nests less deep
            assert found == _texts_by_json(content)
    elif name == "a.txt":
        assert found == [content.removeprefix(b"\xef\xbb\xbf").decode()]


def fuzz_yaml(data: bytes, folder: Path) -> None:
    """The bytes of a --config file."""
    path = folder / "run.yaml"
    path.write_bytes(data)
    try:
        config = read_config(read_yaml(path), str(path))
    except UserError as error:
        _is_good_message(error, folder)
        return
    path.write_text(to_yaml(config), encoding="utf-8")
    assert read_config(read_yaml(path), str(path)) == config


def fuzz_argv(data: bytes, folder: Path) -> None:
    """Words of a command line, one a line."""
    argv = [word.replace("\0", "") for word in data.decode("utf-8", errors="surrogateescape").split("\n")]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            config = parse_run_config(argv)
    except UserError as error:
        assert str(error)
        return
    except SystemExit as stop:
        assert not stop.code  # --help
        return
    assert read_config(read_yaml(_written(config, folder)), "run.yaml") == config


def fuzz_stranger(data: bytes, folder: Path) -> None:
    """What comes to the judge's port: as a stranger's, in pieces of a size that the first byte says; then as a rank's.

    Only who knows the token gets in, no stranger keeps a rank out, and lines of a rank are objects or its end.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        door, size = Door(listener, TOKEN, 2), 1 + 4 * (data[0] if data else 0)
        admitted = []
        with socket.create_connection(listener.getsockname()) as stranger:
            for start in range(1, len(data), size):
                with contextlib.suppress(OSError):  # hung up on
                    stranger.sendall(data[start : start + size])
                admitted += door.admit(0.0)
        for connection, _, _ in admitted:
            assert json.loads(data[1:].split(b"\n")[0])["token"] == TOKEN
            connection.close()
        with socket.create_connection(listener.getsockname()) as rank:
            rank.sendall(HELLO + data)
            ((connection, hello, rest),) = [*door.admit(0.0)]
            assert hello.number == 1
        door.close()
    wire = Wire(connection, rest)
    while not wire.ended:
        assert all(isinstance(message, dict) for message in wire.receive())
    wire.close()


# What a fuzzer would not come upon by itself.
WORDS: dict[str, tuple[bytes, ...]] = {
    "index": (b"MMIDIDX\0\0",),
    "side_file": (b'"json_sha256": "', b'"idx_sha256": "', b"null", b"true"),
    "jsonl": (
        *(b'"text": "', b"\\u0074", b"\\ud83d", b"[[[[[[[[", b"]]]]]]]]", b"1e999", b"NaN"),
        *(b"\xef\xbb\xbf", b"\x1f\x8b\x08"),
    ),
    "yaml": (
        *(b"!!int ", b"!!bool ", b"!!timestamp ", b"!!python/name:", b"&a ", b"*a", b"<<: ", b"0x", b"1:2", b".nan"),
        *(b"2020-01-01", b'"\\0"', b'"\\ud800"', b"? ", b"- ", b"{", b"}", b"---", b"%YAML 1.1", b"n_layers", b"lr"),
    ),
    "argv": (b"--config", b"--preset", b"--tp", b"--n-layers=", b"--lr", b"--data-path", b"--help", b"None", b"nan"),
    "stranger": (
        b'{"token": "secret", ',
        b'"number": 0',
        b'"host": ""',
        b'"pid": 0}',
        b"[[[[",
        b"\\ud800",
    ),
}


TARGETS: dict[str, Target] = {
    "index": fuzz_index,
    "side_file": fuzz_side_file,
    "jsonl": fuzz_jsonl,
    "yaml": fuzz_yaml,
    "argv": fuzz_argv,
    "stranger": fuzz_stranger,
}


def _written(config, folder: Path) -> Path:
    path = folder / "argv.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return path


def _is_good_message(error: UserError, folder: Path) -> None:
    """It names the file and says more; it is not a dump."""
    assert str(error).startswith(str(folder)), error
    assert len(str(error)) < 1000 + len(str(folder)), error


def _check_index(dataset: IndexedDataset, idx: bytes, bin_size: int) -> None:
    """What the reader gives is what the bytes say, read here in the plainest way."""
    _, _, code, n_sequences, n_boundaries = struct.unpack("<9sQBQQ", idx[:34])
    lengths = np.frombuffer(idx, "<i4", n_sequences, 34)
    boundaries = np.frombuffer(idx, "<i8", n_boundaries, 34 + 12 * n_sequences)
    assert dataset.dtype.itemsize == {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}[code]
    assert dataset.lengths.tolist() == lengths.tolist() and min(lengths, default=0) >= 0
    assert dataset.document_indices.tolist() == boundaries.tolist()
    assert boundaries[0] == 0 and boundaries[-1] == n_sequences and (np.diff(boundaries) >= 0).all()
    whole = b"".join(dataset.get(i).tobytes() for i in range(len(dataset)))
    assert len(whole) == bin_size and whole == bytes(i % 251 for i in range(bin_size))


def _texts_by_json(content: bytes) -> list[str]:
    """The documents as Python's own parser reads them."""
    found = []
    for line in (line.removeprefix(b"\xef\xbb\xbf") for line in content.split(b"\n")):
        if line and not line.isspace():
            values = [value for key, value in _pairs(line) if key == "text"]
            assert len(values) == 1, values
            found += values
    return found


def _pairs(line: bytes) -> list[tuple[str, object]]:
    """(key, value) of the outermost object, repeated keys too."""
    outermost: list[tuple[str, object]] = []

    def keep(pairs: list[tuple[str, object]]) -> None:
        outermost[:] = pairs  # called from the inside out

    json.loads(line, object_pairs_hook=keep)
    return outermost


def seeds(name: str) -> list[bytes]:
    """A few inputs of a target that are good, or nearly, for a fuzzer to begin with."""
    if name == "index":
        return [_index([2, 3, 0], [0, 1, 3], 8, 2), _index([5], [0, 1], 4, 4), _index([], [0], 1, 1)]
    if name == "side_file":
        return [b'{"tokenizer": "bytes", "tokenizer_files": [], "vocab_size": 257, "eod": null, "append_eod": true}']
    if name == "jsonl":
        lines = b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "\\u0074\\ud83d\\ude00", "b": [1, {"text": null}], "c": 1e3}'
        zipped = gzip.compress(lines)
        near = b'{"text": "a", "texu": "b"}'
        return [b"\0" + lines, b"\0" + near, b"\5" + lines, b"\1" + zipped, b"\1" + zipped + zipped[:20], b"\3text"]
    if name == "yaml":
        return [
            b"model: {n_layers: 3, norm_eps: 1e-5}\nparallel:\n  tp: 2\ndata:\n  data_path: [0.7, A, 0.3, B]\n",
            b'optim: {lr: .nan}\ntrain: {seed: 0x10, precision: "bf16"}\n# c\n',
            to_yaml(parse_run_config([])).encode(),
        ]
    if name == "stranger":
        strange = [
            b'{"token": "\xc3\xa9", "number": 0}\n',
            b"[" * 3000,
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"token": "\\ud800"}\n',
        ]
        return [b"\x00" + HELLO[:40], *(b"\xff" + line for line in [*strange, HELLO, HELLO + b'{"bye": true}\n'])]
    words = ["--tp", "2", "--model.n-layers=3", "--lr", "1e-3", "--data-path", "0.7", "A", "--recompute"]
    return ["\n".join(part).encode() for part in itertools.accumulate([word] for word in words)]


def _index(lengths: list[int], boundaries: list[int], code: int, itemsize: int) -> bytes:
    pointers = [itemsize * sum(lengths[:i]) for i in range(len(lengths))]
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(boundaries))
    form = f"<{len(lengths)}i{len(lengths)}q{len(boundaries)}q"
    return struct.pack("<I", itemsize * sum(lengths)) + header + struct.pack(form, *lengths, *pointers, *boundaries)
