"""Bad lines and files that are left out, counted and told; and work that is kept when a call ends early."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.text import documents
from megagpt.data.text import prepare as prepare_module
from megagpt.data.text.prepare import BadLines, Progress, TokenizerFiles, prepare
from megagpt.errors import UserError

BYTES = TokenizerFiles(kind="bytes")
SKIP = BadLines(policy="skip")


def lines(first: int, n: int) -> bytes:
    return b"".join(b'{"text": "%d"}\n' % i for i in range(first, first + n))


def found(prefix: Path) -> list[str]:
    dataset = IndexedDataset(f"{prefix}_text_document")
    return [bytes(dataset.get(i).astype("u1")).decode() for i in range(len(dataset))]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Six files with 5 good lines each, four of them with something bad."""
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "0.jsonl").write_bytes(lines(0, 5))
    (folder / "1.jsonl").write_bytes(lines(5, 2) + b'{"text": 1}\n{"text"\n' + lines(7, 3))
    (folder / "2.jsonl").write_bytes(b"")
    (folder / "3.jsonl.gz").write_bytes(gzip.compress(lines(10, 5))[:-8])
    (folder / "4.jsonl").write_bytes(lines(15, 5) + b'{"text": "cut')
    (folder / "5.jsonl").write_bytes(lines(20, 5))
    return folder


@pytest.mark.parametrize("block_bytes", [20, 1 << 20])
def test_what_is_bad_is_left_out_and_told(shards: Path, tmp_path: Path, monkeypatch, block_bytes: int):
    monkeypatch.setattr(documents, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(prepare_module, "BLOCK_BYTES", block_bytes)
    done = prepare([str(shards)], str(tmp_path / "out"), BYTES, bad_lines=SKIP, workers=1)
    assert found(tmp_path / "out") == [str(i) for i in range(25)]
    told = "\n".join(sorted(done.bad))
    for words in (
        "1.jsonl: line 3: key 'text' holds 1, wanted a string",
        "1.jsonl: line 4: byte 7: not JSON",
        "2.jsonl: empty",
        "3.jsonl.gz: damaged or cut off archive",
        "4.jsonl: line 6: byte 13: not JSON",
    ):
        assert words in told
    assert len(done.bad) == 5 and "; " not in told  # no remedies: it is done


def test_there_is_a_limit(shards: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"more than 3 lines or files are bad.*--max-bad-lines"):
        prepare([str(shards)], str(tmp_path / "out"), BYTES, bad_lines=BadLines(policy="skip", most=3), workers=1)
    prepare([str(shards)], str(tmp_path / "out"), BYTES, bad_lines=BadLines(policy="skip", most=5), workers=1)


def test_a_line_that_is_too_long_is_one_bad_line(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(documents, "BLOCK_BYTES", 64)
    (tmp_path / "a.jsonl").write_bytes(lines(0, 9) + b'{"text": "' + b"x" * (3 << 20) + b'"}\n' + lines(9, 9))
    done = prepare([str(tmp_path)], str(tmp_path / "out"), BYTES, bad_lines=SKIP, max_document_mb=1, workers=1)
    assert found(tmp_path / "out") == [str(i) for i in range(18)]
    assert done.bad == [f"{tmp_path}/a.jsonl: line 10: a document of more than 1 MB"]


def many(folder: Path, bad: bool = True) -> list[str]:
    """Files of which the second fills several blocks, and the last one has a bad line."""
    folder.mkdir(exist_ok=True)
    for number, data in enumerate((lines(0, 9), lines(9, 900), b'{"text": ""}\n', lines(909, 90))):
        (folder / f"{number}.jsonl").write_bytes(data)
    (folder / "4.jsonl").write_bytes(lines(999, 1) + (b"{}\n" if bad else b"") + lines(1000, 1))
    return sorted(map(str, folder.iterdir()))


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few lines are a batch of their own."""
    for module in (documents, prepare_module):
        monkeypatch.setattr(module, "BLOCK_BYTES", 10)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("workers", [1, 2])
def test_work_is_kept_but_not_for_files_that_changed(tmp_path: Path, workers: int):
    inputs, out = many(tmp_path / "in"), tmp_path / "out"
    with pytest.raises(UserError, match=r"4.jsonl: line 2: no key.*; 4 of 5 files are done and kept .*goes on after"):
        prepare(inputs, str(out), BYTES, workers=workers)
    assert not Path(f"{out}_text_document.idx").exists()
    many(tmp_path / "in", bad=False)
    os.utime(inputs[0], (5, 5))  # so that it may be another one
    assert prepare(inputs, str(out), BYTES, workers=workers).done_before == 0
    assert found(out) == [str(i) for i in range(1001)]


@pytest.mark.usefixtures("small_blocks")
def test_the_second_call_goes_on_where_the_first_one_ended(tmp_path: Path, monkeypatch):
    inputs = many(tmp_path / "in")
    keys = {"append_eod": True, "workers": 1}
    for name in ("out", "other"):
        with pytest.raises(UserError, match="4 of 5 files are done and kept"):
            prepare(inputs, str(tmp_path / name), BYTES, **keys)
    read: list[str] = []
    monkeypatch.setattr(documents, "chunks", watching(documents.chunks, read))
    (tmp_path / "in" / "4.jsonl").write_bytes(lines(999, 2))
    done = prepare(inputs, str(tmp_path / "out"), BYTES, **keys)
    assert (done.done_before, read) == (4, ["4.jsonl"])
    prepare(inputs, str(tmp_path / "other"), BYTES, append_eod=True, workers=2, overwrite=True)
    prepare(inputs, str(tmp_path / "fresh"), BYTES, **keys)
    parts = [
        [Path(f"{tmp_path / name}_text_document{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]
        for name in ("out", "other", "fresh")
    ]
    assert parts[0] == parts[1] == parts[2]
    assert not list(tmp_path.glob("*.partial"))


class Killed(BaseException):
    """What happens at once after it is nothing."""


@pytest.mark.usefixtures("small_blocks")
def test_a_killed_call_has_kept_the_files_that_were_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inputs, keys = many(tmp_path / "in", bad=False), {"append_eod": True, "workers": 1}
    prepare(inputs, str(tmp_path / "fresh"), BYTES, **keys)
    out, state = tmp_path / "out", {}

    def look(progress: Progress) -> None:
        if progress.documents > 900:
            state.update({path: path.read_bytes() for path in tmp_path.glob("out*.partial")})
            raise Killed

    monkeypatch.setattr(prepare_module, "_MARK_EVERY_S", 0.0)
    with pytest.raises(Killed):
        prepare(inputs, str(out), BYTES, report=look, **keys)
    for path, data in state.items():  # as a kill leaves it: without what the call does at its end
        path.write_bytes(data)
    assert prepare(inputs, str(out), BYTES, **keys).done_before >= 1
    for suffix in (".bin", ".idx", ".json"):
        ours, fresh = (Path(f"{tmp_path / name}_text_document{suffix}").read_bytes() for name in ("out", "fresh"))
        assert ours == fresh


def watching(chunks, read: list[str]):
    def watch(path: Path, n_bytes: int):
        read.append(path.name)
        return chunks(path, n_bytes)

    return watch


@pytest.mark.usefixtures("small_blocks")
def test_kept_work_of_other_settings_is_not_taken(tmp_path: Path):
    inputs, out = many(tmp_path / "in"), str(tmp_path / "out")
    with pytest.raises(UserError, match="are done and kept"):
        prepare(inputs[3:], out, BYTES, workers=1)
    many(tmp_path / "in", bad=False)
    assert prepare(inputs[3:], out, BYTES, append_eod=True, workers=1).done_before == 0


@pytest.mark.usefixtures("small_blocks")
def test_kept_work_that_was_touched_is_refused(tmp_path: Path):
    inputs, out = many(tmp_path / "in"), str(tmp_path / "out")
    with pytest.raises(UserError, match="are done and kept"):
        prepare(inputs[3:], out, BYTES, workers=1)
    with Path(f"{out}_text_document.bin.partial").open("r+b") as file:
        file.write(b"\xff")
    (tmp_path / "in" / "4.jsonl").write_bytes(lines(999, 2))
    with pytest.raises(UserError, match=r"not as an earlier call has left it; delete .*\.partial to begin anew"):
        prepare(inputs[3:], out, BYTES, workers=1)
