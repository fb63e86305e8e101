"""Tokenizers: one protocol, four kinds, built from local files; nothing is downloaded, no code of theirs run.

| kind | files | encoder |
|---|---|---|
| gpt2 | vocab.json, merges.txt | gigatoken: ids equal Hugging Face's, tens of times faster |
| sentencepiece | X.model | sentencepiece |
| hf | tokenizer.json | tokenizers |
| bytes | none | UTF-8 bytes 0–255, end of document 256 |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from megagpt.config import DataConfig
from megagpt.data.indexed.meta import DatasetMeta, meta_path, read_meta
from megagpt.data.tokenizers.files import files_sha256
from megagpt.data.tokenizers.gpt2 import Gpt2Tokenizer
from megagpt.data.tokenizers.hf import HfTokenizer
from megagpt.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megagpt.errors import UserError

KINDS = ("gpt2", "sentencepiece", "hf", "bytes")


class Tokenizer(Protocol):
    """Text to ids and back."""

    kind: str
    files: tuple[Path, ...]
    """What it was built from."""
    sha256: str
    """Over kind and files: two tokenizers with the same one give the same ids."""
    vocab_size: int
    """One more than the largest id."""
    eod: int | None
    """Id that ends a document, where there is one."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no token is added at its ends."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text. **Shapes**: [ids of the text], an integer type."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD."""
        ...

    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 text that each id stands for, 0 for special tokens. **Shapes**: int32[vocab_size].

        Bits per byte = nats / ln 2 / bytes. Exact for tokenizers that keep the text as it is (gpt2, bytes,
        the default corpus's); where one normalises, these are the bytes of the normalised text.
        """
        ...


def build_tokenizer(
    kind: str, *, model: str | None = None, vocab_file: str | None = None, merge_file: str | None = None
) -> Tokenizer:
    """Build a tokenizer of a kind from its files.

    **Raises** `UserError` for a file that is missing, damaged, or contradicts itself.
    """
    match kind:
        case "gpt2":
            return Gpt2Tokenizer(
                _needed(vocab_file, kind, "--vocab-file", "vocab.json"),
                _needed(merge_file, kind, "--merge-file", "merges.txt"),
            )
        case "sentencepiece":
            return SentencePieceTokenizer(_needed(model, kind, "--tokenizer-model", "X.model"))
        case "hf":
            return HfTokenizer(_needed(model, kind, "--tokenizer-model", "tokenizer.json"))
        case "bytes":
            return ByteTokenizer()
    raise UserError(f"--tokenizer {kind} is not known; wanted one of {', '.join(KINDS)}")


def tokenizer_for(data: DataConfig, prefix: str | Path) -> Tokenizer | None:
    """The tokenizer of a dataset: as `prefix.json` records it, or where data says that it is now.

    None where nothing is recorded and nothing is named (a dataset of Megatron-LM: set model.vocab_size then).

    **Raises** `UserError` when its files are gone, or are not those that wrote the dataset.
    """
    return tokenizers_for(data, [prefix])[0]


def tokenizers_for(data: DataConfig, prefixes: Sequence[str | Path]) -> list[Tokenizer | None]:
    """`tokenizer_for` each of several datasets; what has the same files is built once."""
    built: dict[tuple[str | None, ...], Tokenizer] = {}
    found: list[Tokenizer | None] = []
    for prefix in prefixes:
        meta = read_meta(prefix)
        kind = data.tokenizer or (meta.tokenizer if meta else None)
        if kind is None:
            found.append(None)
            continue
        model, vocab_file, merge_file = _files(data, kind, meta, Path(prefix).parent)
        key = (kind, model, vocab_file, merge_file)
        if key not in built:
            built[key] = build_tokenizer(kind, model=model, vocab_file=vocab_file, merge_file=merge_file)
        if meta is not None:
            _check_same(built[key], meta, prefix)
        found.append(built[key])
    return found


def _files(
    data: DataConfig, kind: str, meta: DatasetMeta | None, folder: Path
) -> tuple[str | None, str | None, str | None]:
    """Model, vocabulary and merges: those that data names, else those that meta records."""
    model, vocab_file, merge_file = data.tokenizer_model, data.vocab_file, data.merge_file
    if meta is not None and meta.tokenizer == kind:
        recorded = [_recorded(path, folder) for path in meta.tokenizer_files]
        if kind == "gpt2" and len(recorded) == 2:
            vocab_file, merge_file = vocab_file or recorded[0], merge_file or recorded[1]
        elif recorded:
            model = model or recorded[0]
    return model, vocab_file, merge_file


def tokenizer_of_run(data: DataConfig) -> Tokenizer | None:
    """The tokenizer of a run's data; that of an imported model, which has none, is the one it names.

    **Raises** `UserError` as `tokenizer_for`.
    """
    if data.data_path:
        return tokenizer_for(data, data.data_path.prefixes[0])
    if data.tokenizer is None:
        return None
    return build_tokenizer(
        data.tokenizer, model=data.tokenizer_model, vocab_file=data.vocab_file, merge_file=data.merge_file
    )


def _recorded(path: str, folder: Path) -> str:
    """A recorded file, or the one of its name beside the dataset if the dataset was moved with it."""
    beside = folder / Path(path).name
    return str(beside) if not Path(path).exists() and beside.exists() else path


def _check_same(tokenizer: Tokenizer, meta: DatasetMeta, prefix: str | Path) -> None:
    if (tokenizer.kind, tokenizer.sha256) != (meta.tokenizer, meta.tokenizer_sha256):
        names = ", ".join(map(str, tokenizer.files)) or tokenizer.kind
        raise UserError(
            f"{names}: tokenizer {tokenizer.kind} with SHA-256 {tokenizer.sha256[:16]}… did not write this "
            f"dataset: {meta_path(prefix)} records {meta.tokenizer} with {meta.tokenizer_sha256[:16]}…; "
            "give --tokenizer-model (or --vocab-file and --merge-file) of that one"
        )


def _needed(value: str | None, kind: str, option: str, example: str) -> Path:
    if value is None:
        raise UserError(f"--tokenizer {kind} needs {option}; give the path of its {example}")
    return Path(value)


class ByteTokenizer:
    """UTF-8 bytes as ids, and 256 as end of document."""

    kind = "bytes"
    files: tuple[Path, ...] = ()
    sha256 = files_sha256("bytes", ())
    vocab_size = 257
    eod: int | None = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)
