"""Readers of input: what is a document, in which order, cut how."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.text import documents
from megagpt.data.text.documents import find_inputs, read_blocks, texts
from megagpt.errors import UserError

LIMIT = 1 << 20


def _read(*inputs: Path, input_format: documents.Format = "auto", limit: int = LIMIT) -> list[str]:
    files = find_inputs(inputs, input_format)
    return [text for block in read_blocks(files, limit) for (text,) in texts(block, ["text"])]


def _lines(*values: str) -> bytes:
    return "".join(json.dumps({"text": value}) + "\n" for value in values).encode()


def test_order_and_kinds_of_files(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "z.txt").write_text("second")
    (folder / "a.md").write_text("first\nwith two lines\n")
    (folder / "c.jsonl").write_bytes(_lines("third", "fourth"))
    (folder / ".hidden").write_text("no")
    (tmp_path / "x.txt.gz").write_bytes(gzip.compress(b"zipped"))
    (tmp_path / "y.ndjson.zst").write_bytes(zstandard.ZstdCompressor().compress(_lines("fifth")))
    found = _read(tmp_path / "y.ndjson.zst", folder, tmp_path / "x.txt.gz")
    assert found == ["fifth", "first\nwith two lines\n", "second", "third", "fourth", "zipped"]


def test_format_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "part-0").write_bytes(_lines("a", "b"))
    assert _read(tmp_path / "part-0", input_format="jsonl") == ["a", "b"]
    assert _read(tmp_path / "part-0", input_format="text") == [_lines("a", "b").decode()]


@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.text(st.characters(codec="utf-8"), max_size=30), min_size=1, max_size=30),
    block_bytes=st.integers(1, 200),
    suffix=st.sampled_from(["", ".gz", ".zst"]),
    final_newline=st.booleans(),
)
def test_cutting_into_blocks_loses_nothing(
    values: list[str], block_bytes: int, suffix: str, final_newline: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever the size of the blocks: the same documents, and line numbers that fit."""
    data = _lines(*values) if final_newline else _lines(*values)[:-1]
    pack = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.ZstdCompressor().compress}[suffix]
    path = tmp_path_factory.mktemp("cut") / f"a.jsonl{suffix}"
    path.write_bytes(pack(data))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK_BYTES", block_bytes)
        blocks = list(read_blocks(find_inputs([path]), LIMIT))
    assert b"".join(block.data for block in blocks) == data
    assert sum(block.stored_bytes for block in blocks) == path.stat().st_size
    line = 1
    for block in blocks:
        assert block.first_line == line
        line += block.data.count(b"\n")
    assert [text for block in blocks for (text,) in texts(block, ["text"])] == values


def test_several_members_and_frames(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(_lines("a")) + gzip.compress(_lines("b")))
    pack = zstandard.ZstdCompressor().compress
    (tmp_path / "b.jsonl.zst").write_bytes(pack(_lines("c")) + pack(b"") + pack(_lines("d")))
    assert _read(tmp_path / "a.jsonl.gz", tmp_path / "b.jsonl.zst") == ["a", "b", "c", "d"]


def test_several_keys(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": "a", "n": 1}\n')
    (block,) = read_blocks(find_inputs([tmp_path / "a.jsonl"]), LIMIT)
    assert list(texts(block, ["answer", "question"])) == [("a", "q")]


def test_the_limit_names_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(_lines("x" * 400) + _lines(*"abc") + _lines("y" * 2000) + _lines("z"))
    assert len(_read(path, limit=3000)) == 6
    with pytest.raises(UserError, match=r"a\.jsonl: line 5: "):
        _read(path, limit=1000)


def test_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")
    assert _read(tmp_path / "a.txt") == ["a\ufeff"]  # elsewhere it is a character
