"""The default corpus, over a part of the standard library so that it takes a second."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from megagpt.config import DataConfig
from megagpt.data.indexed.dataset import IndexedDataset, verify
from megagpt.data.text import corpus
from megagpt.data.text.corpus import default_cache_dir, default_corpus
from megagpt.data.tokenizers.tokenizer import tokenizer_for
from megagpt.errors import UserError

STDLIB = Path(sysconfig.get_paths()["stdlib"])


@pytest.fixture(scope="module")
def small_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stdlib")
    for package in ("asyncio", "email", "json", "http", "xml"):
        shutil.copytree(STDLIB / package, root / package)
    (root / "__pycache__").mkdir()
    (root / "__pycache__" / "no.py").write_text("no")
    (root / "latin.py").write_bytes(b"# \xe9")
    (root / "empty.py").write_bytes(b"")
    return root


@pytest.fixture(autouse=True)
def _use_small_library(small_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(small_library)})
    monkeypatch.setattr(corpus, "_SAMPLE_BYTES", 500_000)


def test_the_text_is_all_there_to_the_byte(small_library: Path, tmp_path: Path) -> None:
    said: list[str] = []
    prefix = default_corpus(tmp_path, said.append)
    assert len(said) == 1 and "Python standard library" in said[0]
    verify(IndexedDataset(prefix))
    dataset, tokenizer = IndexedDataset(prefix), tokenizer_for(DataConfig(), prefix)
    assert tokenizer is not None and tokenizer.vocab_size == 4096 and dataset.dtype == np.uint16
    sources = (path for path in small_library.rglob("*.py") if path.parent.name != "__pycache__")
    expected = {path.read_text("utf-8") for path in sources if path.name != "latin.py"} - {""}
    found = [dataset.get(i).tolist() for i in range(len(dataset))]
    assert all(ids[-1] == tokenizer.eod for ids in found)
    texts = [tokenizer.decode(ids[:-1]) for ids in found]
    assert set(texts) == expected
    for text, ids in zip(texts, found, strict=True):
        assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())
    assert texts != sorted(texts)  # shuffled
    assert len(tokenizer.encode("\n")) == 1  # newlines and indentation are tokens
    assert len(tokenizer.encode("        ")) == 1
    assert len(tokenizer.encode("def f(x):\n    return x\n")) <= 10

    assert default_corpus(tmp_path, said.append) == prefix
    assert len(said) == 1  # nothing slow the second time


def test_a_killed_build_is_begun_again_and_gives_the_same(tmp_path: Path) -> None:
    prefix = default_corpus(tmp_path, lambda message: None)
    first = [Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx", ".json")]
    Path(f"{prefix}.idx").rename(f"{prefix}.idx.partial")  # as if it had died before the last rename
    Path(f"{prefix}.bin").write_bytes(b"half")
    assert default_corpus(tmp_path, lambda message: None) == prefix
    assert [Path(prefix + suffix).read_bytes() for suffix in (".bin", ".idx", ".json")] == first


def test_several_processes_build_once(small_library: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from megagpt.data.text import corpus; "
        "corpus.sysconfig.get_paths = lambda: {'stdlib': sys.argv[1]}; corpus._SAMPLE_BYTES = 500_000; "
        "print(corpus.default_corpus(Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, str(small_library), str(tmp_path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    outputs = [process.communicate(timeout=100)[0].splitlines() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len({lines[-1] for lines in outputs}) == 1
    assert sum(line.startswith("preparing") for lines in outputs for line in lines) == 1


def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--data\.cache-dir"):
        default_corpus(tmp_path / "file")
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path / "none")})
    with pytest.raises(UserError, match="--data-path"):
        default_corpus(tmp_path)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/megagpt")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache_dir() == Path.home() / ".cache" / "megagpt"


def test_who_has_no_home_has_a_cache_of_his_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = default_cache_dir()
    assert folder == tmp_path / f"megagpt-{os.getuid()}" == default_cache_dir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)  # as somebody else might have made it
    with pytest.raises(UserError, match="belongs to another user; set HOME, or "):
        default_cache_dir()
