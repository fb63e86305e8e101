"""The list of bad inputs that every tool meets, by number, and the marks that say which test feeds which.

`@pytest.mark.bad_input(3, 4)`, or a table whose names begin with the number: `numbered(TABLE)`.
tests/test_bad_inputs.py holds that every number has its tests.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

GOOD_LINE = b'{"text": "good"}\n'

NAMES = {
    1: "empty file", 2: "no final newline (valid)", 3: "invalid UTF-8", 4: "byte-order mark", 5: "NUL bytes",
    6: "a line of 1 GB", 7: "nesting 100,000 deep", 8: "key missing", 9: "text that is not a string",
    10: "lone surrogate", 11: "NaN or a huge integer", 12: "duplicate key", 13: "gzip bomb", 14: "truncated gzip",
    15: "FIFO, directory, symlink loop",
    16: "missing tokenizer file", 17: "truncated tokenizer JSON", 18: "duplicate ids",
    19: "vocabulary unlike the model's", 20: "id above the dtype's maximum", 21: "no end-of-text token",
    22: "a field that asks to run remote code",
    23: "magic", 24: "version", 25: "dtype code", 26: "count 2^63", 27: "count times size overflow",
    28: "negative length", 29: "pointer past the end", 30: "pointers that disagree with lengths",
    31: "unsorted document index", 32: ".bin too short", 33: ".bin too long", 34: "trailing bytes",
    35: "token beyond the vocabulary", 36: "the .idx of another .bin", 37: ".bin truncated while it is read",
    38: "a pickled .npy cache",
    39: "`latest` missing", 40: "`latest` empty", 41: "../ in `latest`", 42: "shard missing", 43: "shard truncated",
    44: "one bit flipped", 45: "shards of two steps mixed", 46: "a pickle payload", 47: "another topology (valid)",
    48: "another architecture",
    49: "unknown key, !!python tag, NaN or negative value", 50: "disk full, read-only, existing or locked output",
}  # fmt: skip


def numbered(names: Iterable[str]) -> list:
    """Parameters of a test from names such as "12 duplicate key", each marked with its number."""
    return [pytest.param(name, id=name, marks=pytest.mark.bad_input(int(name.split()[0]))) for name in names]


def contents(folder: Path, pattern: str) -> dict[str, bytes]:
    """File name -> bytes: what must not change."""
    return {path.name: path.read_bytes() if path.is_file() else b"no file" for path in folder.glob(pattern)}
