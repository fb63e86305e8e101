"""Whether two tokenizers are one, such as a tokenizer.json and the vocab.json and merges.txt beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megagpt.data.tokenizers.tokenizer import Tokenizer


_AFTER = ("7", "378", "x", "Xx", ".", "'s", "ü", "中", "e\u0301", "ﬁ")
SAMPLE = "def main(x):\n\treturn {'a': 1}  # two  spaces, 1234567890 == 12 3\r\nDon't SHOUT, they'll hear\u00a0you.\n"
"""Blanks, digits and scripts in all the neighbourhoods that pre-tokenizers tell apart; no special tokens."""
SAMPLE += "".join(blank * n + after for blank in (" ", "\n", "\t", "\n ") for n in range(1, 10) for after in _AFTER)
_MOST_TOKENS = 1 << 19  # twice the largest published vocabulary
_JOINED = 40  # tokens


def same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether both give the same ids: to a text of blanks, digits and scripts, and to each token of either."""
    if (a.vocab_size, a.eod) != (b.vocab_size, b.eod) or a.vocab_size > _MOST_TOKENS:
        return False
    texts = [SAMPLE, *_token_texts(a), *_token_texts(b)]
    return all(map(np.array_equal, a.encode_batch(texts), b.encode_batch(texts)))


def _token_texts(tokenizer: Tokenizer) -> Iterator[str]:
    """The text of each token alone, then of neighbours in the vocabulary, apart: special and added ones included."""
    texts = [tokenizer.decode([i]) for i in range(tokenizer.vocab_size)]
    yield from texts
    for start in range(0, len(texts), _JOINED):
        yield " ".join(texts[start : start + _JOINED])
