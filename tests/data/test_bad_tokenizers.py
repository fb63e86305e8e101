"""Bad tokenizer files: one line that names the file, exit code 2, nothing run or lost. Numbers: tests/bad_inputs.py."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.bad_inputs import numbered


def _gpt2(vocab_file: Path, merge_file: Path) -> tuple[object, ...]:
    return ("gpt2", "--vocab-file", vocab_file, "--merge-file", merge_file)


@pytest.mark.bad_input(16)
def test_tokenizer_files_that_are_missing(source: Path, tmp_path: Path, preprocess, gpt2_files) -> None:
    missing = tmp_path / "none"
    for kind in ("hf", "sentencepiece"):
        preprocess(source, tokenizer=(kind, "--tokenizer-model", missing)).refused(str(missing), "No such file")
        preprocess(source, tokenizer=(kind,)).refused("--tokenizer-model")
    preprocess(source, tokenizer=("gpt2", "--vocab-file", gpt2_files[0])).refused("--merge-file")
    preprocess(source, tokenizer=_gpt2(missing, gpt2_files[1])).refused(str(missing))


@pytest.mark.bad_input(17)
def test_tokenizer_files_that_are_cut(
    source: Path, tmp_path: Path, preprocess, gpt2_files, hf_file, sentencepiece_file
) -> None:
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


@pytest.mark.bad_input(18, 20)
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


def _change(key: str, value: object) -> Callable[[dict], None]:
    return lambda values: values.update({key: value})


def _replace(content: str, **pattern: str) -> dict:
    return {"type": "Replace", "pattern": pattern, "content": content}


HOSTILE = {
    "doubling": ("normalizer", [_replace("aa", String="a")] * 1000, "times as long"),
    "doubling when decoded": ("decoder", [_replace("a" * 9999, String="a")], "times as long"),
    "between all characters": ("normalizer", [_replace("a" * 9999, Regex="")], "times as long"),
    "before all texts": ("normalizer", [{"type": "Prepend", "prepend": "a" * 9999}], "times as long"),
    "an index of 4 GB": ("normalizer", [{"type": "Precompiled", "precompiled_charsmap": "/////wAA"}], "announces"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_files_that_ask_for_much_memory(case: str, source: Path, tmp_path: Path, preprocess, hf_file) -> None:
    key, parts, words = HOSTILE[case]
    inner = {"normalizer": "normalizers", "decoder": "decoders"}[key]
    model = _with(hf_file, _change(key, {"type": "Sequence", inner: parts}), tmp_path / "tokenizer.json")
    preprocess(source, tokenizer=("hf", "--tokenizer-model", model)).refused(str(model), words)


@pytest.mark.bad_input(18, 20)
def test_ids_far_beyond_all_vocabularies(source: Path, tmp_path: Path, preprocess, gpt2_files, hf_file) -> None:
    """A table of all ids would have gigabytes."""
    vocab = _with(gpt2_files[0], _change("a", 2**31 - 2), tmp_path / "vocab.json")
    preprocess(source, tokenizer=_gpt2(vocab, gpt2_files[1])).refused(str(vocab), "2147483646")
    added = [{"id": 2**31 - 2, "content": "x", "special": True}]
    model = _with(hf_file, _change("added_tokens", added), tmp_path / "tokenizer.json")
    preprocess(source, tokenizer=("hf", "--tokenizer-model", model)).refused(str(model), "2147483646")


def test_text_that_a_tokenizer_cannot_encode(source: Path, tmp_path: Path, preprocess, hf_file) -> None:
    words = {"type": "WordLevel", "vocab": {"b": 7}, "unk_token": "?"}
    model = _with(hf_file, _change("model", words), tmp_path / "tokenizer.json")
    preprocess(source, tokenizer=("hf", "--tokenizer-model", model)).refused(str(model), "cannot encode a text")


@pytest.mark.bad_input(16, 17)
def test_files_of_another_kind(source: Path, tmp_path: Path, preprocess, hf_file, sentencepiece_file) -> None:
    other = tmp_path / "tokenizer.model"
    for kind, data, words in (
        ("sentencepiece", b"", "empty"),
        ("sentencepiece", b"IQ== 33\nIg== 34\n", "tiktoken"),
        ("sentencepiece", hf_file.read_bytes(), "--tokenizer hf"),
        ("hf", b"IQ== 33\n", "tiktoken"),
        ("hf", sentencepiece_file.read_bytes(), "--tokenizer sentencepiece"),
        ("hf", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        ("hf", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ):
        other.write_bytes(data)
        preprocess(source, tokenizer=(kind, "--tokenizer-model", other)).refused(str(other), words)


@pytest.mark.bad_input(18)
def test_a_token_that_is_written_twice(source: Path, tmp_path: Path, preprocess, gpt2_files) -> None:
    vocab = tmp_path / "vocab.json"
    vocab.write_bytes(gpt2_files[0].read_bytes().replace(b"{", b'{"a": 7777, ', 1))
    preprocess(source, tokenizer=_gpt2(vocab, gpt2_files[1])).refused(str(vocab), "'a'", "twice")


@pytest.mark.bad_input(19)
def test_merges_of_another_vocabulary(source: Path, tmp_path: Path, preprocess, gpt2_files) -> None:
    merges = tmp_path / "merges.txt"
    merges.write_bytes(gpt2_files[1].read_bytes() + "ł ł\n".encode())
    n_lines = merges.read_text().count("\n")
    preprocess(source, tokenizer=_gpt2(gpt2_files[0], merges)).refused(str(merges), f"line {n_lines}")


@pytest.mark.bad_input(21)
def test_no_end_of_text_token(source: Path, tmp_path: Path, preprocess, gpt2_files) -> None:
    vocab = _with(gpt2_files[0], lambda v: v.pop("<|endoftext|>"), tmp_path / "vocab.json")
    kind = _gpt2(vocab, gpt2_files[1])
    preprocess(source, "--append-eod", tokenizer=kind).refused("--append-eod", str(vocab))
    preprocess(source, tokenizer=kind).succeeded()


@pytest.mark.bad_input(22)
def test_remote_code_is_never_run(source: Path, tmp_path: Path, preprocess, hf_file) -> None:
    folder = _with_code(tmp_path, hf_file)
    preprocess(source, tokenizer=("hf", "--tokenizer-model", folder)).refused("tokenizer_config.json", "'auto_map'")
    preprocess(source, tokenizer=("hf", "--tokenizer-model", folder / "tokenizer.json")).succeeded()
    assert not (tmp_path / "ran").exists()


# The same at the start of training: the files that the dataset records have changed since.


@pytest.fixture
def trained_on(source: Path, tmp_path: Path, run_tool, gpt2_files) -> tuple[str, Path]:
    """(prefix of a dataset, its vocab.json)."""
    files = [shutil.copy(path, tmp_path) for path in gpt2_files]
    run_tool(
        "preprocess_data", "--input", source, "--output-prefix", tmp_path / "bpe", "--tokenizer", *_gpt2(*files)
    ).succeeded()  # fmt: skip
    return f"{tmp_path}/bpe_text_document", tmp_path / "vocab.json"


def _change_id(data: bytes, number: int) -> bytes:
    values = json.loads(data)
    return json.dumps(values | {"a": number}).encode()


CHANGED = {
    "17 cut": (lambda data: data[:-100], ["line 1"]),
    "18 duplicate ids": (lambda data: _change_id(data, 1), ["'a'", "id 1 belongs"]),
    "18 a token twice": (lambda data: data.replace(b"{", b'{"a": 7777, ', 1), ["'a'", "twice"]),
    "19 another vocabulary": (lambda data: _change_id(data, 5000), ["did not write this dataset"]),
    "20 above int32": (lambda data: _change_id(data, 2**31), ["'a'", str(2**31)]),
}


@pytest.mark.parametrize("case", numbered(CHANGED))
def test_training_with_a_changed_tokenizer(case: str, trained_on: tuple[str, Path], run_training) -> None:
    prefix, vocab = trained_on
    assert run_training("--data-path", prefix).code == -1
    change, words = CHANGED[case]
    vocab.write_bytes(change(vocab.read_bytes()))
    run_training("--data-path", prefix).refused(f"{vocab}", *words)


@pytest.mark.bad_input(16)
def test_training_without_the_tokenizers_files(trained_on: tuple[str, Path], run_training) -> None:
    prefix, vocab = trained_on
    vocab.unlink()
    run_training("--data-path", prefix).refused(str(vocab), "No such file")


@pytest.mark.bad_input(19)
def test_training_a_model_with_another_vocabulary(
    trained_on: tuple[str, Path], dataset_prefix: str, run_training, gpt2_files
) -> None:
    prefix, _ = trained_on
    run_training("--data-path", prefix, "--vocab-size", 100).refused("model.vocab_size=100", "800", "--vocab-size")
    run_training("--data-path", "0.5", prefix, "0.5", dataset_prefix).refused("different tokenizers", prefix)
    Path(f"{prefix}.json").unlink()
    run_training("--data-path", prefix).refused(prefix, "--tokenizer", "--vocab-size")
    run_training("--data-path", prefix, "--tokenizer", "gpt2").refused("--vocab-file")


@pytest.mark.bad_input(22)
def test_training_runs_no_code_of_a_tokenizer(dataset_prefix: str, tmp_path: Path, run_training, hf_file) -> None:
    folder = _with_code(tmp_path, hf_file)
    Path(f"{dataset_prefix}.json").unlink()
    named = ("--data-path", dataset_prefix, "--tokenizer", "hf", "--tokenizer-model")
    run_training(*named, folder).refused("tokenizer_config.json", "'auto_map'")
    assert run_training(*named, folder / "tokenizer.json").code == -1
    assert not (tmp_path / "ran").exists()


def _with_code(tmp_path: Path, hf_file: Path) -> Path:
    """A tokenizer's folder that asks to run evil.py, which would leave a file `ran`."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(hf_file.read_bytes())
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Evil", null]}}')
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    return folder
