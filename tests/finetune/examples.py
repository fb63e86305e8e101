"""Small files of each format, and a tokenizer, for the tests of fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megagpt.data.tokenizers.bytes import ByteTokenizer
from megagpt.data.tokenizers.tokenizer import UNBOUND
from megagpt.finetune.glue import GLUE, Columns
from megagpt.finetune.task import Reading

READING = Reading(ByteTokenizer(), UNBOUND, vocab=257, seq_len=48)
WORDS = ["good", "bad", "fine", "poor", "great", "awful"]


def write_pairs(path: Path, n: int = 40) -> Path:
    """Prompts and completions of unequal lengths."""
    rows = [{"prompt": f"{i}+{i}=", "completion": str(2 * i) * (1 + i % 3)} for i in range(n)]
    return write_lines(path, rows)


def write_lines(path: Path, rows: list[Any]) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_glue(path: Path, task: str, n: int = 12) -> Path:
    """A file of a task in its published form: the columns that matter between others."""
    columns = GLUE[task]
    header = list(columns.header) or ["index", *columns.texts, "more", columns.label]
    lines = [] if columns.header else ["\t".join(header)]
    lines += ["\t".join(_field(name, columns, i) for name in header) for i in range(n)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _field(name: str, columns: Columns, i: int) -> str:
    if name in columns.texts:
        return f"{WORDS[i % 6]} {columns.texts.index(name)} {'x' * (i % 3)}"
    if name == columns.label:
        return columns.classes[i % len(columns.classes)] if columns.classes else f"{i % 6}.0"
    return str(i)
