"""Time and memory of the maps of the training samples: C++ beside NumPy, each in a process of its own.

    python benchmarks/index.py                    10^9 tokens, 3 epochs, a blend of 4
    python benchmarks/index.py --tokens 1e8 --seq-len 2048

Then, from files in the page cache: what it costs to open an index, and to read a micro-batch.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.random import RandomState

from megagpt.config import ModelConfig, RunConfig, TrainConfig
from megagpt.config.values import Split
from megagpt.data.indexed import index_builder as maps
from megagpt.data.indexed.blend import build_splits
from megagpt.data.indexed.dataset import IndexedDataset, IndexedWriter
from megagpt.data.loader import micro_batches
from megagpt.errors import ArgumentParser, UserError, run_cli


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=float, default=1e9, help="tokens of the dataset (default 1e9)")
    parser.add_argument("--mean-length", type=int, default=500, help="tokens of a document (default 500)")
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens of a sample (default 1024)")
    parser.add_argument("--epochs", type=float, default=2.5, help="how much is asked (default 2.5)")
    parser.add_argument("--datasets", type=int, default=4, help="datasets of the blend (default 4)")
    return parser.parse_args()


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds, and MiB that the memory of this process rose to above where it was."""
    before_kib = _memory_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the peak so far
    start_s = time.perf_counter()
    result = work()
    took_s = time.perf_counter() - start_s
    peak_kib = _memory_kib("VmHWM")
    del result
    return took_s, (peak_kib - before_kib) / 1024


def _memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(task: str, backend: str, args: argparse.Namespace) -> tuple[float, float]:
    """One task with one backend; runs in a fresh process, for the peak of the memory."""
    lengths = RandomState(0).geometric(1 / args.mean_length, int(args.tokens / args.mean_length))
    lengths = lengths.astype(np.int32)
    tokens = int(lengths.sum(dtype=np.int64))
    epochs = maps.plan_epochs(tokens, int(args.epochs * tokens / args.seq_len), args.seq_len)
    random = RandomState(1234)
    if task == "blending indices":
        build = maps.blending_indices_numpy if backend == "NumPy" else maps.build_blending_indices
        shares = np.full(args.datasets, 1 / args.datasets)
        return measured(lambda: build(shares, epochs.n_samples))
    if task == "shuffle index":
        return measured(lambda: maps.build_shuffle_index(epochs, random))
    if task == "document index":
        return measured(lambda: maps.build_document_index(0, len(lengths), epochs, random))
    documents = maps.build_document_index(0, len(lengths), epochs, random)
    if backend == "C++":
        return measured(lambda: maps.build_sample_index(lengths, documents, args.seq_len, epochs.n_samples))
    dtype = maps.sample_index_dtype(len(documents))
    return measured(lambda: maps.sample_index_numpy(lengths, documents, args.seq_len, epochs.n_samples, dtype))


def opening_s(n_documents: int) -> tuple[float, float]:
    """Seconds to open a dataset of n_documents: all that is checked; and those of its SHA-256 alone."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "d"
        with IndexedWriter(prefix, np.uint16) as writer:
            writer.add_documents(np.zeros(n_documents, np.uint16), np.ones(n_documents, np.int64))
        Path(f"{prefix}.idx").read_bytes()
        start_s = time.perf_counter()
        IndexedDataset(prefix)
        opened_s = time.perf_counter()
        with open(f"{prefix}.idx", "rb") as file:
            hashlib.file_digest(file, "sha256")
        return opened_s - start_s, time.perf_counter() - opened_s


def reading_us(seq_len: int, micro_batch_size: int) -> float:
    """Microseconds of one micro-batch, averaged over a shuffled epoch of about 10^7 tokens."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder) / "d"
        with IndexedWriter(prefix, np.uint16) as writer:
            for length in random.geometric(1 / 500, 20_000):
                writer.add_document(random.integers(0, 50_000, length))
        batch = 64 * micro_batch_size
        samples = build_splits([IndexedDataset(prefix)], (), Split.parse("1"), seq_len, 1234, (batch, 0, 0))[0]
        assert samples is not None
        config = RunConfig(
            model=ModelConfig(seq_len=seq_len, vocab_size=50_000),
            train=TrainConfig(global_batch_size=batch, micro_batch_size=micro_batch_size),
        )
        n_steps = len(samples) // batch
        start_s = time.perf_counter()
        for step in range(n_steps):
            positions = range(step * batch, (step + 1) * batch)
            for _ in micro_batches(samples, config, positions, seq_len, dp_rank=0, dp_size=1):
                pass
        return (time.perf_counter() - start_s) / (n_steps * 64) * 1e6


def main() -> None:
    args = parse_arguments()
    if note := maps.fallback_note():
        raise UserError(note.removeprefix("note: "))
    print(f"{args.tokens:.0e} tokens, {args.epochs} epochs, seq_len {args.seq_len}\n")
    print(f"{'':20}{'C++':>20}{'NumPy':>20}")
    tasks = {"document index": 1, "sample index": 2, "shuffle index": 1, "blending indices": 2}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for task, n_backends in tasks.items():
            cells = [pool.apply(measure, (task, name, args)) for name in ("C++", "NumPy")[-n_backends:]]
            shown = [f"{took_s:.2f} s {peak_mib:6.0f} MiB" for took_s, peak_mib in cells]
            print(f"{task:20}{shown[0] if n_backends == 2 else '':>20}{shown[-1]:>20}", flush=True)
    n_documents = int(args.tokens / args.mean_length)
    opened_s, hashed_s = opening_s(n_documents)
    gb = 20 * n_documents / 1e9
    print(f"\nopening an index of {n_documents:,} documents: {opened_s:.2f} s, of which its SHA-256 {hashed_s:.2f} s")
    print(f"a GB of index (50 million documents): {opened_s / gb:.1f} s, of which SHA-256 {hashed_s / gb:.1f} s")
    print(f"one micro-batch of 4 x {args.seq_len} tokens: {reading_us(args.seq_len, 4):.0f} us")


if __name__ == "__main__":
    run_cli(main)
