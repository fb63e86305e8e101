"""Small tokenizers and datasets, made here from the standard library's text; tools run in this process."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megagpt.data.indexed.dataset import IndexedWriter
from megagpt.errors import run_cli
from megagpt.train.pretrain import pretrain
from tests.bad_inputs import GOOD_LINE, contents

ROOT = Path(__file__).parents[2]
SAMPLE_TEXT = Path(json.__file__).read_text(encoding="utf-8")


@dataclass
class Outcome:
    """What a tool did."""

    code: int
    out: str
    err: str

    def refused(self, *words: str) -> None:
        """Exit code 2 and one line that holds all the words."""
        assert self.code == 2, self
        lines = [line for line in self.err.splitlines() if line]
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        for word in words:
            assert word in self.err, f"{word!r} is not in {self.err!r}"

    def succeeded(self) -> None:
        assert self.code == 0, self


@functools.cache
def load_tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_tool(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """run_tool("preprocess_data", "--input", …) -> Outcome; the tool's own `main` under `run_cli`."""

    def run(name: str, *args: object) -> Outcome:
        tool = load_tool(name)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            run_cli(lambda: tool.main([str(arg) for arg in args]))
        captured = capsys.readouterr()
        return Outcome(int(exit_info.value.code or 0), captured.out, captured.err)

    return run


@pytest.fixture
def run_training(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """run_training("--data-path", P) -> Outcome; examples/pretrain_gpt.py in this process, up to where torch loads.

    code -1: all was well so far, and training would begin.
    """

    def run(*args: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            pretrain([str(arg) for arg in args])
        captured = capsys.readouterr()
        return Outcome(int(exit_info.value.code or 0), captured.out, captured.err)

    monkeypatch.setitem(
        sys.modules, "megagpt.train.text", SimpleNamespace(train_on_text=lambda config, data: sys.exit(-1))
    )
    monkeypatch.setattr(os, "_exit", sys.exit)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return run


@pytest.fixture(params=["inspect_data", "pretrain_gpt"])
def open_dataset(
    request: pytest.FixtureRequest, run_tool: Callable[..., Outcome], run_training: Callable[..., Outcome]
) -> Callable[[str], Outcome]:
    """Open a dataset as users do, each in turn: to look into it, and to train on it."""
    if request.param == "inspect_data":
        return lambda prefix: run_tool("inspect_data", prefix)
    return lambda prefix: run_training("--data-path", prefix, "--vocab-size", 257)


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """Output of an earlier run; `preprocess` checks that it survives."""
    with IndexedWriter(tmp_path / "out_text_document", np.uint16) as writer:
        writer.add_document(np.array([1, 2, 3]))
    return tmp_path / "out"


@pytest.fixture
def preprocess(run_tool: Callable[..., Outcome], earlier: Path) -> Callable[..., Outcome]:
    """Run the tool over an input, to an output that exists and may be overwritten: it stays as it was if refused."""

    def run(source: Path, *options: object, tokenizer: tuple[object, ...] = ("bytes",)) -> Outcome:
        before = contents(earlier.parent, "out_*")
        outcome = run_tool(
            "preprocess_data", "--input", source, "--output-prefix", earlier, "--overwrite", "--workers", 1,
            "--tokenizer", *tokenizer, *options,
        )  # fmt: skip
        if outcome.code:
            assert contents(earlier.parent, "out_*") == before
        return outcome

    return run


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An input that is fine."""
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD_LINE)
    return path


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """vocab.json and merges.txt of a small byte-level BPE with GPT-2's end-of-text token."""
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(
        [SAMPLE_TEXT],
        trainers.BpeTrainer(
            vocab_size=800,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.model.save(str(folder))
    return folder / "vocab.json", folder / "merges.txt"


@pytest.fixture(scope="session")
def hf_file(tmp_path_factory: pytest.TempPathFactory, reference_bpe: Tokenizer) -> Path:
    """The same BPE as a tokenizer.json."""
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    reference_bpe.save(str(path))
    return path


@pytest.fixture(scope="session")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small SentencePiece model that gives texts back to the byte."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE_TEXT.splitlines(keepends=True)), model_writer=model, model_type="bpe",
        vocab_size=600, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("sentencepiece") / "small.model"
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="session")
def reference_bpe(gpt2_files: tuple[Path, Path]) -> Tokenizer:
    """GPT-2's tokenizer as Hugging Face's library builds it."""
    vocab_file, merge_file = map(str, gpt2_files)
    tokenizer = Tokenizer(models.BPE.from_file(vocab_file, merge_file))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


@pytest.fixture(scope="session")
def sample_text() -> str:
    """What the small tokenizers were trained on."""
    return SAMPLE_TEXT


@pytest.fixture
def shared() -> Callable[[str], Path]:
    """shared("gpt2_bpe/vocab.json"): real data beside the repository; the test is skipped where there is none."""

    def find(name: str) -> Path:
        path = ROOT.parent / "shared" / "data" / name
        if not path.exists():
            pytest.skip(f"{path} is not here")
        return path

    return find


@pytest.fixture
def dataset_prefix(tmp_path: Path, run_tool: Callable[..., Outcome]) -> str:
    """A dataset of three documents, byte tokens with end of document: 6, 3 and 5 tokens."""
    source = tmp_path / "source.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("hello", "hi", "abcd")))
    prefix = tmp_path / "small"
    run_tool(
        "preprocess_data",
        "--input",
        source,
        "--output-prefix",
        prefix,
        "--tokenizer",
        "bytes",
        "--append-eod",
    ).succeeded()
    return f"{prefix}_text_document"
