"""A dataset of random tokens, without tokenizer: what a test of the whole program starts with in a moment."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megagpt.data.indexed.dataset import IndexedWriter

VOCAB_SIZE = 128


def write_tiny_data(prefix: Path) -> str:
    """500 documents of 40 to 80 tokens; give --vocab-size 128 with it."""
    random = np.random.default_rng(1)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in random.integers(40, 80, 500):
            writer.add_document(random.integers(0, VOCAB_SIZE, length))
        writer.finish()
    return str(prefix)
