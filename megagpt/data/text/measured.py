"""What a tokenizer made of some text: how many bytes went in, and how much of it the tokens still say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megagpt.data.tokenizers.tokenizer import Tokenizer


_SAMPLE_CHARS = 4096  # of each batch, which has a MiB


@dataclass
class Measured:
    """text_bytes, sampled_bytes: UTF-8 bytes that were tokenized; that were decoded again, to compare.

    token_text_bytes: those that the tokens stand for, by the tokenizer's table. lost_bytes: of the sample, what did not
    come back, by character.
    """

    text_bytes: int = 0
    token_text_bytes: int = 0
    unknown_tokens: int = 0
    sampled_bytes: int = 0
    lost_bytes: dict[str, int] = field(default_factory=dict)

    def add(self, other: Measured) -> None:
        """Count in what was made of other text."""
        self.text_bytes += other.text_bytes
        self.token_text_bytes += other.token_text_bytes
        self.unknown_tokens += other.unknown_tokens
        self.sampled_bytes += other.sampled_bytes
        for character, count in other.lost_bytes.items():
            self.lost_bytes[character] = self.lost_bytes.get(character, 0) + count

    @property
    def lost_share(self) -> float:
        """Of the sample."""
        return sum(self.lost_bytes.values()) / max(1, self.sampled_bytes)

    @property
    def lost_characters(self) -> str:
        """Up to five that are lost most often."""
        return "".join(character for character, _ in Counter(self.lost_bytes).most_common(5))


def measure(tokenizer: Tokenizer, sizes: np.ndarray, texts: Sequence[str], tokens: np.ndarray) -> Measured:
    """The figures of texts and their tokens. sizes: `tokenizer.token_bytes()`."""
    sample = next(filter(None, texts), "")[:_SAMPLE_CHARS]
    lost = Counter(sample) - Counter(tokenizer.decode(tokenizer.encode(sample)))
    return Measured(
        text_bytes=sum(map(_n_bytes, texts)),
        token_text_bytes=int(sizes[tokens].sum(dtype=np.int64)),
        unknown_tokens=0 if tokenizer.unknown is None else int((tokens == tokenizer.unknown).sum()),
        sampled_bytes=_n_bytes(sample),
        lost_bytes={character: count * _n_bytes(character) for character, count in lost.items()},
    )


def _n_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())
