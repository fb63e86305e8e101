"""What is told of an input file by its first bytes and its last line: the true cause, before any work is done."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
from pathlib import Path

import pytest
import zstandard

from megagpt.data.text.documents import find_inputs, read_blocks, texts
from megagpt.data.text.first_look import Format
from megagpt.errors import UserError
from tests.bad_inputs import GOOD_LINE

LIMIT = 1 << 20
TWO_LINES = b'{"text": "a"}\n{"text": "b"}\n'


def read(path: Path, input_format: Format = "auto", key: str = "text") -> list[str]:
    files = find_inputs([path], input_format, [key])
    return [text for block in read_blocks(files, LIMIT) for (text,) in texts(block, [key])]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: ")
    return str(refused.value)


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def long_window(data: bytes) -> bytes:
    """As `zstd --long=28` packs: the window, 256 MiB, is beyond the library's own limit of 128."""
    settings = zstandard.ZstdCompressionParameters(window_log=28, write_content_size=False, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.gzip", "a.JSONL.BZ2"])
@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress, long_window])
def test_what_packs_a_file_is_told_by_its_first_bytes(tmp_path: Path, pack, name: str):
    assert read(write(tmp_path / name, pack(TWO_LINES))) == ["a", "b"]


@pytest.mark.parametrize("pack", [bz2.compress, lzma.compress])
def test_a_cut_archive(tmp_path: Path, pack):
    assert "damaged or cut off archive" in refusal(write(tmp_path / "a.jsonl", pack(GOOD_LINE * 999)[:-9]))


def test_a_name_that_promises_an_archive(tmp_path: Path):
    assert "its name says gzip, its first bytes do not" in refusal(write(tmp_path / "a.jsonl.gz", GOOD_LINE))


AS_TEXT = {
    "data.json.1": TWO_LINES,
    "jsonl.txt": TWO_LINES,
    "part-0": b'\xef\xbb\xbf{"id": 1, "text": "a"}\n',
    "page.html": b'{"text": "a"}',
    "other key.txt": b'{"content": "a"}\n{"content": "b"}\n',
    "long.txt": b'{"id": "' + b"x" * (1 << 17) + b'", "text": "a"}\n',
    "packed.txt.gz": gzip.compress(TWO_LINES),
}


@pytest.mark.parametrize("name", AS_TEXT)
def test_json_lines_under_another_name_are_not_trained_on_as_text(tmp_path: Path, name: str):
    path = write(tmp_path / name, AS_TEXT[name])
    assert "its first line is a JSON object" in refusal(path) and "--input-format jsonl" in refusal(path)
    key = "content" if name.startswith("other") else "text"
    assert read(path, "jsonl", key)[0] == "a"
    assert read(path, "text")[0].startswith("{")


@pytest.mark.parametrize("data", [b'[\n  {\n    "text": "a"\n  }\n]\n', b'{\n  "text": "a"\n}\n', b'[{"text": "a"}]'])
def test_json_over_several_lines(tmp_path: Path, data: bytes):
    assert "line 1: " in refusal(write(tmp_path / "a.json", data)) and "jq -c" in refusal(tmp_path / "a.json")
    assert "holds JSON over several lines" in refusal(write(tmp_path / "a.txt", data))


@pytest.mark.parametrize("text", [b"{ a brace }\n", b"[1] a note\n", b'{"a": 1}\nand prose\n', b"", b"{{template}}"])
def test_text_that_only_begins_like_json_is_text(tmp_path: Path, text: bytes):
    assert read(write(tmp_path / "a.txt", text)) == [text.decode()]


def test_upper_case_names_are_the_same_names(tmp_path: Path):
    assert read(write(tmp_path / "a.JSONL", TWO_LINES)) == ["a", "b"]


def test_joined_files_have_their_marks_inside(tmp_path: Path):
    line = b'\xef\xbb\xbf{"text": "a"}\n'
    assert read(write(tmp_path / "a.jsonl", line + line)) == ["a", "a"]


FOREIGN = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d\nsize 12345\n", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s3--2c.jsonl\n", "git annex get"),
    "parquet": (b"PAR1\x15\x04", "a Parquet file"),
    "lz4": (b"\x04\x22\x4d\x18abc", "packed by lz4; unpack it"),
    "lzma": (b"\x5d\x00\x00\x80\x00", "packed by lzma; unpack it (xz -d)"),
    "zip": (b"PK\x03\x04\x14\x00", "a zip archive"),
    "tar": (b"a.txt".ljust(257, b"\x00") + b"ustar\x0000", "a tar archive"),
    "utf-16": ('{"text": "a"}\n'.encode("utf-16"), "iconv -f UTF-16"),
}


@pytest.mark.parametrize("suffix", ["jsonl", "txt", "jsonl.gz"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_other_formats_are_called_by_their_names(tmp_path: Path, kind: str, suffix: str):
    data, words = FOREIGN[kind]
    assert words in refusal(write(tmp_path / f"a.{suffix}", gzip.compress(data) if "gz" in suffix else data))


def test_a_web_page_is_no_json(tmp_path: Path):
    assert "a web page" in refusal(write(tmp_path / "a.jsonl", b"<!DOCTYPE html>\n<title>404</title>"))
    assert read(write(tmp_path / "a.html", b"<html>")) == ["<html>"]


def test_bad_files_are_counted_before_the_work(tmp_path: Path):
    write(tmp_path / "a.jsonl", GOOD_LINE)
    write(tmp_path / "b.jsonl", b"")
    write(tmp_path / "c.jsonl", GOOD_LINE * 3 + b'{"text": "cut o')
    with pytest.raises(UserError, match=r"b.jsonl: empty; .* \(and 1 more files"):
        find_inputs([tmp_path])
    with pytest.raises(UserError, match=r"c.jsonl: its last line, from byte 51 on, is cut; .*--on-bad-line skip"):
        find_inputs([tmp_path / "c.jsonl"])
    told: list[UserError] = []
    found = find_inputs([tmp_path], tell=told.append)
    assert [file.path.name for file in found] == ["a.jsonl", "c.jsonl"] and len(told) == 1


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for data in (TWO_LINES, gzip.compress(TWO_LINES)):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))  # type: ignore[arg-type]
        assert read(Path("-")) == ["a", "b"]
    with pytest.raises(UserError, match="twice"):
        find_inputs(["-", tmp_path, "-"] if list(tmp_path.iterdir()) else ["-", "-"])


def test_keys_within_keys(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", b'{"a": {"b": "x", "c": {"b": 1}}, "b": 2}\n{"a.b": "y", "a": {"b": 3}}\n')
    assert read(path, key="a.b") == ["x", "y"]
    for line, words in (
        (b'{"a": {"b": "x", "b": "y"}}', "twice"),
        (b'{"a": {"b": "x"}, "\\u0061": {}}', "no key 'a.b'"),
        (b'{"a": {"b": "x"}, "\\u0061": {"b": "y"}}', "twice"),
        (b'{"a": ["b"]}', "no key 'a.b'"),
        (b'{"a": {"b": {}}}', "wanted a string"),
    ):
        with pytest.raises(UserError, match=words):
            read(write(path, line + b"\n"), key="a.b")
    assert read(write(path, b'{"l": [{"a": {"b": 1}}], "a": {"b": "x", "x": {"a": {"b": 1}}}}\n'), key="a.b") == ["x"]
