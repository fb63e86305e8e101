"""Flip bits and cut bytes of a dataset's files, and count who finds it: nothing may be read otherwise unseen.

    python -m tests.soak.index_damage --flips 2000 --cuts 500 --seed 0 --json damage.json

The exit code is 1 where a check that should find all of it (GUARDED) did not. The other rows compare: what the
structure of an index tells without a side file, what Megatron-core's reader tells, and what is left to --verify.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.data.indexed.dataset import IndexedDataset, IndexedWriter, verify
from megagpt.data.indexed.meta import DatasetMeta
from megagpt.errors import UserError

N_DOCUMENTS = 1000
VOCAB_SIZE = 257
# By what it was found; or it was not, and the reader gave the same contents, or others.
BY_STRUCTURE, BY_HASH, SAME, SILENT = "structure", "hash", "unfound, reads the same", "silent"
OUTCOMES = (BY_STRUCTURE, BY_HASH, SAME, SILENT)

Contents = tuple[bytes, bytes, bytes, str]  # tokens, lengths, document boundaries, side file, as a reader gives them
Reader = Callable[[Path], Contents]


def damage(data: bytes, kind: str, count: int, random: np.random.Generator) -> Iterator[bytes]:
    """`count` damaged copies of data: "flips" of one bit; or "cuts", half at the end, half somewhere."""
    for i in range(count):
        if kind == "flips":
            at, bit = int(random.integers(len(data))), int(random.integers(8))
            yield data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
        else:
            start = int(random.integers(len(data)))
            stop = len(data) if i % 2 else int(random.integers(start, len(data))) + 1
            yield data[:start] + data[stop:]


def count_outcomes(reader: Reader, prefix: Path, suffix: str, damaged: Iterator[bytes]) -> dict[str, int]:
    """Put each damaged copy in place of one file of a dataset and read; the file is as before afterwards."""
    path = Path(f"{prefix}{suffix}")
    good, expected = path.read_bytes(), reader(prefix)
    found: Counter[str] = Counter()
    try:
        for data in damaged:
            path.write_bytes(data)
            found[_outcome(reader, prefix, expected)] += 1
    finally:
        path.write_bytes(good)
    return {outcome: found[outcome] for outcome in OUTCOMES}


def _outcome(reader: Reader, prefix: Path, expected: Contents) -> str:
    try:
        got = reader(prefix)
    except UserError as error:
        return BY_HASH if "SHA-256" in str(error) or "json_sha256" in str(error) else BY_STRUCTURE
    return SAME if got == expected else SILENT


def opened(prefix: Path) -> Contents:
    """As training opens it, and reads what it needs of each document."""
    dataset = IndexedDataset(prefix)
    tokens = b"".join(dataset.get(i).tobytes() for i in range(len(dataset)))
    return tokens, dataset.lengths.tobytes(), dataset.document_indices.tobytes(), repr(dataset.meta)


def verified(prefix: Path) -> Contents:
    """As `tools/inspect_data.py --verify`, and training with --data.verify."""
    verify(IndexedDataset(prefix))
    return opened(prefix)


def by_megatron(prefix: Path) -> Contents:
    """As Megatron-core reads it. Whatever it raises counts as found."""
    megatron = importlib.import_module("megatron.core.datasets.indexed_dataset")  # heavy, and for the comparison only
    with contextlib.redirect_stderr(io.StringIO()):  # half a dataset complains when it is deleted
        try:
            dataset = megatron.IndexedDataset(str(prefix))
            tokens = b"".join(dataset.get(i).tobytes() for i in range(len(dataset)))
            return tokens, dataset.sequence_lengths.tobytes(), dataset.document_indices.tobytes(), ""
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
    raise UserError(what)


# (what is shown, file that is damaged, reader, whether P.json is there, whether all damage must be found)
ROWS: tuple[tuple[str, str, Reader, bool, bool], ...] = (
    ("opening", ".idx", opened, True, True),
    ("opening", ".json", opened, True, True),
    ("--verify", ".bin", verified, True, True),
    ("opening", ".bin", opened, True, False),
    ("opening, no .json", ".idx", opened, False, False),
    ("Megatron-core", ".idx", by_megatron, False, False),
)


def run(folder: Path, n_flips: int, n_cuts: int, seed: int, *, peers: bool = True) -> list[dict[str, Any]]:
    """Damage every file in every way; one dictionary a row and kind."""
    with_json, without_json = folder / "recorded", folder / "bare"
    for prefix, has_side_file in ((with_json, True), (without_json, False)):
        make_dataset(prefix, seed, has_side_file)
    rows = []
    for who, suffix, reader, has_side_file, guarded in ROWS:
        if reader is by_megatron and not peers:
            continue
        prefix = with_json if has_side_file else without_json
        for kind, count in (("flips", n_flips), ("cuts", n_cuts)):
            damaged = damage(Path(f"{prefix}{suffix}").read_bytes(), kind, count, np.random.default_rng(seed))
            counts = count_outcomes(reader, prefix, suffix, damaged)
            rows.append({"file": suffix, "reader": who, "damage": kind, "count": count, "guarded": guarded} | counts)
    return rows


def make_dataset(prefix: Path, seed: int, has_side_file: bool) -> None:
    """Documents of 0 to 40 tokens."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, 41, N_DOCUMENTS)
    meta = DatasetMeta(
        tokenizer="bytes", tokenizer_files=(), tokenizer_sha256="0" * 64, vocab_size=VOCAB_SIZE, eod=256,
        append_eod=False, documents=N_DOCUMENTS, tokens=int(lengths.sum()), text_bytes=int(lengths.sum()),
    )  # fmt: skip
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_documents(random.integers(0, VOCAB_SIZE, int(lengths.sum())), lengths)
        writer.finish(meta if has_side_file else None)


def unfound(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows in which a check let something through that it should have found."""
    return [row for row in rows if row["guarded"] and row[SILENT]]


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    columns = ["file", "reader", "damage", "count", *OUTCOMES]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(f"{row[c]}" for c in columns) + " |" for row in rows])


def main() -> int:
    """Exit code 1 where a check that should find all damage did not."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.index_damage", description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=2000, help="bits to flip, in each row (default: 2000)")
    parser.add_argument("--cuts", type=int, default=500, help="cuts, in each row (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the dataset and of the damage (default: 0)")
    parser.add_argument("--json", type=Path, help="write the counts here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = run(Path(folder), arguments.flips, arguments.cuts, arguments.seed)
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({"seed": arguments.seed, "rows": rows}, indent=1) + "\n")
    return 1 if unfound(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
