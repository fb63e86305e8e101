"""Tokenizers: one protocol, four kinds, built from local files; nothing is downloaded, no code of theirs run.

| kind | files | encoder |
|---|---|---|
| gpt2 | vocab.json, merges.txt | gigatoken: ids equal Hugging Face's, tens of times faster |
| sentencepiece | tokenizer.model | sentencepiece |
| hf | tokenizer.json | tokenizers |
| bytes | none | UTF-8 bytes 0–255, end of document 256 |
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from megagpt.data.indexed.meta import DatasetMeta, meta_path, read_meta
from megagpt.data.tokenizers.bytes import ByteTokenizer
from megagpt.data.tokenizers.files import FileOption
from megagpt.data.tokenizers.gpt2 import Gpt2Tokenizer
from megagpt.data.tokenizers.hf import HfTokenizer
from megagpt.data.tokenizers.sentencepiece import SentencePieceTokenizer
from megagpt.errors import UserError

if TYPE_CHECKING:
    from megagpt.config import DataConfig


@dataclass(frozen=True)
class Bounds:
    """Ids that a model wants around a text beyond what its tokenizer's `encode` gives: none for those trained here.

    begin: before a prompt (LLaMA's <s>).  ends: each of these ends what is written; none: the tokenizer's `eod` does.
    """

    begin: tuple[int, ...] = ()
    ends: tuple[int, ...] = ()

    def begun(self, ids: Sequence[int]) -> tuple[int, ...]:
        """A prompt with `begin` before it, once: its text may have named it already."""
        there = tuple(ids)
        return there if there[: len(self.begin)] == self.begin else self.begin + there


UNBOUND = Bounds()


class Tokenizer(Protocol):
    """Text to ids and back. What a kind declares of itself: `kind`, `options`, `transformers_settings`."""

    kind: ClassVar[str]
    options: ClassVar[tuple[FileOption, ...]]
    """The files it is built from, in the order of its constructor's arguments."""
    files: tuple[Path, ...]
    """What it was built from."""
    sha256: str
    """Over kind and files: two tokenizers with the same one give the same ids."""
    vocab_size: int
    """One more than the largest id."""
    eod: int | None
    """Id that ends a document, where there is one."""
    unknown: int | None
    """Id of text that it does not know, where there is one."""

    def __init__(self, *files: Any, **_: Any) -> None: ...  # a path for each of its options

    @property
    def transformers_settings(self) -> dict[str, Any]:
        """The tokenizer_config.json that lets transformers read these files; empty where it cannot."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text; no token is added at its ends."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text. **Shapes**: [ids of the text], an integer type."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Bytes that are no UTF-8 become U+FFFD, ids beyond the vocabulary nothing."""
        ...

    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 text that each id stands for, 0 for special tokens. **Shapes**: int32[vocab_size].

        Those of the text itself for tokenizers that keep it as it is (gpt2, bytes, the default corpus's); where one
        normalises, of the normalised text, and none for what it does not know.
        """
        ...


KINDS: dict[str, type[Tokenizer]] = {
    kind.kind: kind for kind in (Gpt2Tokenizer, SentencePieceTokenizer, HfTokenizer, ByteTokenizer)
}


def build_tokenizer(
    kind: str, *, model: str | None = None, vocab_file: str | None = None, merge_file: str | None = None
) -> Tokenizer:
    """Build a tokenizer of a kind from its files.

    **Raises** `UserError` for a file that is missing, damaged, or contradicts itself.
    """
    if kind not in KINDS:
        raise UserError(f"--tokenizer {kind} is not known; wanted one of {', '.join(KINDS)}")
    given = {"model": model, "vocab_file": vocab_file, "merge_file": merge_file}
    return KINDS[kind](*(_needed(given[option.key], kind, option) for option in KINDS[kind].options))


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
        files = _files(data, kind, meta, Path(prefix).parent)
        key = (kind, *files.values())
        if key not in built:
            built[key] = build_tokenizer(kind, **files)
        if meta is not None:
            _check_same(built[key], meta, prefix)
        found.append(built[key])
    return found


def _files(data: DataConfig, kind: str, meta: DatasetMeta | None, folder: Path) -> dict[str, str | None]:
    """By the keys of `FileOption`: the files that data names, else those that meta records."""
    named = named_files(data)
    if meta is not None and meta.tokenizer == kind and kind in KINDS:
        for option, path in zip(KINDS[kind].options, meta.tokenizer_files, strict=False):
            named[option.key] = named[option.key] or _recorded(path, folder)
    return named


def tokenizer_of_run(data: DataConfig) -> Tokenizer | None:
    """The tokenizer of a run's data; that of an imported model, which has none, is the one it names.

    **Raises** `UserError` as `tokenizer_for`.
    """
    if data.data_path:
        return tokenizer_for(data, data.data_path.prefixes[0])
    return build_tokenizer(data.tokenizer, **named_files(data)) if data.tokenizer else None


def named_files(data: DataConfig) -> dict[str, str | None]:
    """The files that the configuration names, by the keys of `FileOption`."""
    return {"model": data.tokenizer_model, "vocab_file": data.vocab_file, "merge_file": data.merge_file}


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


def other_tokenizer(tokenizer: Tokenizer | None, meta: DatasetMeta | None) -> str | None:
    """What to say of a model that reads a dataset of another tokenizer than its own; None where it is the same one."""
    if tokenizer is None or meta is None or meta.tokenizer_sha256 == tokenizer.sha256:
        return None
    return (
        f"the dataset was made by another tokenizer ({meta.tokenizer}, {meta.vocab_size:,} tokens) than the model's "
        f"({tokenizer.kind}, {tokenizer.vocab_size:,} tokens): unless both give the same ids, its figures mean nothing"
    )


def _needed(value: str | None, kind: str, option: FileOption) -> Path:
    if value is None:
        raise UserError(f"--tokenizer {kind} needs {option.flag}; give the path of its {option.name}")
    return Path(value)
