"""How many bytes of text tokens stand for, which bits per byte are counted by."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from megagpt.data.indexed.meta import DatasetMeta
    from megagpt.data.tokenizers.tokenizer import Tokenizer


def text_bytes(tokens: np.ndarray, meta: DatasetMeta | None, tokenizer: Tokenizer, sizes: np.ndarray) -> float | None:
    """UTF-8 bytes of the text itself: what the tokens say, and the dataset's share of what they do not.

    sizes: `tokenizer.token_bytes()`. A tokenizer that drops or changes text, or does not know it, thus gains nothing.
    None where that share is not recorded, and text that the tokenizer does not know is among it.
    """
    said = int(sizes[tokens].sum(dtype=np.int64))
    if meta is None or not meta.token_text_bytes:
        return None if tokenizer.unknown is not None and bool((tokens == tokenizer.unknown).any()) else said
    return said * meta.text_bytes / meta.token_text_bytes
