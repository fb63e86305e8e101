"""A tokenizer without files: the bytes of UTF-8."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from megagpt.data.tokenizers.files import FileOption, files_sha256


class ByteTokenizer:
    """UTF-8 bytes as ids, and 256 as end of document."""

    kind: ClassVar[str] = "bytes"
    options: ClassVar[tuple[FileOption, ...]] = ()
    files: tuple[Path, ...] = ()
    sha256 = files_sha256("bytes", ())
    vocab_size = 257
    eod: int | None = 256
    unknown: int | None = None

    @property
    def transformers_settings(self) -> dict[str, Any]:
        return {}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], np.int32)
