"""SentencePiece models (Kudo and Richardson 2018), BPE or unigram, by their own library."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from sentencepiece import SentencePieceProcessor

from megagpt.data.tokenizers.files import (
    MAX_ID,
    REDO,
    FileOption,
    files_sha256,
    other_kind,
    read_tokenizer_file,
)
from megagpt.data.tokenizers.hf import piece_bytes
from megagpt.errors import UserError


class SentencePieceTokenizer:
    """An `X.model`; its end-of-sentence token, where it has one, ends documents."""

    kind: ClassVar[str] = "sentencepiece"
    options: ClassVar[tuple[FileOption, ...]] = (FileOption("model", "--tokenizer-model", "tokenizer.model"),)

    def __init__(self, path: Path) -> None:
        data = read_tokenizer_file(path)
        self.files: tuple[Path, ...] = (path,)
        self.sha256 = files_sha256(self.kind, (data,))
        if what := other_kind(self.kind, data):
            raise UserError(f"{path}: {what}")
        try:
            self._processor = SentencePieceProcessor(model_proto=data)
        except (RuntimeError, OSError):
            raise UserError(f"{path}: not a SentencePiece model; {REDO}") from None
        self.vocab_size: int = self._processor.vocab_size()
        if not 0 < self.vocab_size < MAX_ID:
            raise UserError(f"{path}: has {self.vocab_size} pieces, wanted 1 to {MAX_ID - 1}; {REDO}")
        self.eod: int | None = self._processor.eos_id() if self._processor.eos_id() >= 0 else None
        self.unknown: int | None = self._processor.unk_id()

    @property
    def transformers_settings(self) -> dict[str, Any]:
        return {
            "tokenizer_class": "LlamaTokenizer",
            "legacy": False,
            "add_prefix_space": False,
            "add_bos_token": False,
            "split_special_tokens": True,  # of no text does an end of sentence come
        }

    def encode(self, text: str) -> list[int]:
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts), num_threads=1)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int32)
        for i in range(self.vocab_size):
            if not (self._processor.is_control(i) or self._processor.is_unknown(i)):
                counts[i] = piece_bytes(self._processor.id_to_piece(i))
        return counts
