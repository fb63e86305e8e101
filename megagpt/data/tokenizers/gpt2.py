"""GPT-2's byte-level BPE from `vocab.json` and `merges.txt`, encoded by gigatoken.

On one core it is ten times as fast as Hugging Face's library at first sight of a text, or more, and twenty times
once its cache is warm, with the same ids (benchmarks/preprocess.py, tests/data/test_tokenizer.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import gigatoken
import numpy as np

from megagpt.data.tokenizers.files import (
    REDO,
    FileOption,
    byte_alphabet,
    check_ids,
    files_sha256,
    parse_json_object,
    read_tokenizer_file,
)
from megagpt.errors import UserError

END_OF_TEXT = "<|endoftext|>"
# The encoder remembers every word that it has met, about 90 bytes each, for ever. A fresh one after so many
# characters (0.1 s) bounds that: about 100 MB for web text, 2 GB for the worst text there is.
_RENEW_AFTER_CHARS = 256 << 20


class Gpt2Tokenizer:
    """GPT-2's tokenizer; `<|endoftext|>` in a text becomes its id, as Hugging Face does."""

    kind: ClassVar[str] = "gpt2"
    unknown: int | None = None
    options: ClassVar[tuple[FileOption, ...]] = (
        FileOption("vocab_file", "--vocab-file", "vocab.json"),
        FileOption("merge_file", "--merge-file", "merges.txt"),
    )

    def __init__(self, vocab_file: Path, merge_file: Path) -> None:
        self.files: tuple[Path, ...] = (vocab_file, merge_file)
        vocab_data, merge_data = read_tokenizer_file(vocab_file), read_tokenizer_file(merge_file)
        vocab = parse_json_object(vocab_file, vocab_data)
        self.vocab_size = check_ids(vocab_file, vocab.items())
        self.eod: int | None = vocab.get(END_OF_TEXT)
        self.sha256 = files_sha256(self.kind, (vocab_data, merge_data))
        self._vocab = vocab
        self._definition = _definition(vocab, _merges(vocab_file, vocab, merge_file, merge_data))
        self._renew()

    @property
    def transformers_settings(self) -> dict[str, Any]:
        return {"tokenizer_class": "GPT2Tokenizer"}

    def encode(self, text: str) -> list[int]:
        return self._encode(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        known = np.fromiter((i for i in ids if i < self.vocab_size), np.uint32)  # another one would end the process
        return self._encoder.decode(known).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int32)
        for token, i in self._vocab.items():
            counts[i] = len(token) if i != self.eod else 0  # one character a byte
        return counts

    def _encode(self, text: str) -> np.ndarray:
        if self._chars_seen > _RENEW_AFTER_CHARS:
            self._renew()
        self._chars_seen += len(text)
        return self._encoder.encode(text)

    def _renew(self) -> None:
        self._encoder = gigatoken.Tokenizer.from_json(self._definition)
        self._chars_seen = 0


def missing_byte(vocab: dict[str, int]) -> str | None:
    """A character of byte-level BPE that a vocabulary lacks; None for one of GPT-2's kind. GPT-1's is of another."""
    return next((character for character in byte_alphabet() if character not in vocab), None)


def _merges(vocab_file: Path, vocab: dict[str, int], path: Path, data: bytes) -> list[tuple[str, str]]:
    """The merge rules, each checked against the vocabulary."""
    if missing := missing_byte(vocab):
        raise UserError(
            f"{vocab_file}: has no token for the byte character {missing!r}, so it is not of GPT-2's kind; give the "
            "model's tokenizer.json with --tokenizer hf"
        )
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start}: not UTF-8; {REDO}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if not line or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.rstrip("\r").partition(" ")
        for token in (left, right, left + right):
            if not space or token not in vocab:
                raise UserError(
                    f"{path}: line {number}: merges into {token!r}, which {vocab_file} lacks; "
                    "give two files of the same tokenizer"
                )
        merges.append((left, right))
    return merges


def _definition(vocab: dict[str, int], merges: list[tuple[str, str]]) -> str:
    """The same tokenizer in the format of tokenizer.json, which gigatoken reads."""
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {"id": vocab.get(END_OF_TEXT), "content": END_OF_TEXT, "special": True} | plain
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [special] if END_OF_TEXT in vocab else [],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {"type": "BPE", "vocab": vocab, "merges": merges},
        }
    )
