"""A run's folder has its tokenizer: it reads and writes where it is moved to, and says what it lacks."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from megagpt.config import DataConfig
from megagpt.config.values import DataPath
from megagpt.data.tokenizers.kept import keep, tokenizer_of_checkpoint
from megagpt.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megagpt.errors import UserError

DATA = DataConfig(data_path=DataPath(("gone/a_text_document",)))  # a relative path, seen from elsewhere


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def written(folder: Path, word: str = "ab") -> Tokenizer:
    """A tokenizer.json of single characters, and what transformers says beside it of its end of text."""
    folder.mkdir()
    vocab = {c: i for i, c in enumerate(dict.fromkeys([*word, *"xyz", "</s>"]))}
    words = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "x"}))
    return build_tokenizer("hf", model=str(folder / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["hf", "bytes"])
def test_a_moved_run_has_its_tokenizer(run: Path, tmp_path: Path, kind: str):
    ours = written(tmp_path / "files") if kind == "hf" else build_tokenizer("bytes")
    keep(ours, run)
    keep(ours, run)  # the next start
    shutil.rmtree(tmp_path / "files", ignore_errors=True)
    moved = run.rename(tmp_path / "moved")
    found = tokenizer_of_checkpoint(moved, DATA, ours.sha256)
    assert found is not None and (found.kind, found.sha256, found.eod) == (ours.kind, ours.sha256, ours.eod)
    assert found.encode("abba") == ours.encode("abba")


def test_what_is_not_there_is_said(run: Path, tmp_path: Path):
    ours, other = written(tmp_path / "files"), written(tmp_path / "other", "ba")
    with pytest.raises(
        UserError, match=r"was trained with a tokenizer .SHA-256 .*neither in .*run/tokenizer nor where"
    ):
        tokenizer_of_checkpoint(run, DATA, ours.sha256)
    assert tokenizer_of_checkpoint(run, DATA, None) is None  # trained on ids
    given = DataConfig(tokenizer="hf", tokenizer_model=str(tmp_path / "files" / "tokenizer.json"))
    found = tokenizer_of_checkpoint(run, DATA, ours.sha256, given)
    assert found is not None and found.sha256 == ours.sha256
    with pytest.raises(UserError, match=r"the flags name another tokenizer: .*files/tokenizer.json has SHA-256"):
        tokenizer_of_checkpoint(run, DATA, other.sha256, given)


def test_a_tokenizer_that_was_changed_or_is_no_longer_the_runs_is_told_apart(run: Path, tmp_path: Path):
    first, second = written(tmp_path / "first"), written(tmp_path / "second", "ba")
    keep(first, run)
    keep(second, run)
    for ours in (first, second):  # older checkpoints had the first
        found = tokenizer_of_checkpoint(run, DATA, ours.sha256)
        assert found is not None and found.sha256 == ours.sha256
    path = run / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text().replace('"z"', '"w"'))
    with pytest.raises(UserError, match=r"run/tokenizer: a file has changed"):
        tokenizer_of_checkpoint(run, DATA, second.sha256)
    (run / "tokenizer" / "about.json").write_text('{"tokenizer": "tiktoken"}')
    with pytest.raises(UserError, match=r"about.json: names no tokenizer"):
        tokenizer_of_checkpoint(run, DATA, second.sha256)


def test_a_link_in_its_place_is_not_written_through(run: Path, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (run / "tokenizer").symlink_to(tmp_path / "precious")
    keep(build_tokenizer("bytes"), run)
    assert not (run / "tokenizer").is_symlink() and os.listdir(tmp_path / "precious") == []


def test_an_imported_run_from_before_is_found_where_it_was_moved_to(run: Path, tmp_path: Path):
    """It names files by their paths, and has no about.json."""
    ours = written(run / "tokenizer")
    data = DataConfig(tokenizer="hf", tokenizer_model="/somewhere/else/tokenizer.json")
    found = tokenizer_of_checkpoint(run, data, None)
    assert found is not None and found.sha256 == ours.sha256
