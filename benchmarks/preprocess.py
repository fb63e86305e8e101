"""Preprocessing beside Megatron-LM's: the same input, tokenizer and number of workers, in one run, ids compared.

    python benchmarks/preprocess.py                                     the default corpus's text, 2 workers
    python benchmarks/preprocess.py --input web.jsonl --vocab-file vocab.json --merge-file merges.txt

Megatron-LM's side is its loop, written anew: a pool of processes, json.loads and transformers' GPT-2 tokenizer
per document, megatron-core's builder in the parent. Without --vocab-file, a byte-level BPE of GPT-2's size is
trained on the input first (half a minute). Then: the encoders on one core, and what reading a document costs.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.tokenizers.gpt2 import END_OF_TEXT, Gpt2Tokenizer
from megagpt.errors import ArgumentParser, run_cli
from megagpt.files import json_text

TOOL = Path(__file__).parents[1] / "tools" / "preprocess_data.py"


def main() -> None:
    args = _parse()
    if args.reference:
        run_reference(args)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = Path(args.input) if args.input else _write_library(folder / "library.jsonl")
        texts = [json.loads(line)["text"] for line in source.read_text(encoding="utf-8").splitlines()]
        if not args.vocab_file:
            args.vocab_file, args.merge_file = _train_bpe(texts, folder)
        result = {
            "input": args.input or "the Python standard library",
            "documents": len(texts),
            "text_mb": round(sum(len(text.encode()) for text in texts) / 1e6, 2),
            "workers": args.workers,
            "cores": os.cpu_count(),
            "rounds": args.rounds,
            **compare_tools(source, folder, len(texts), args),
            "one_core_mb_per_s": compare_encoders(texts, args),
            "microseconds_a_read": compare_reads(folder / "ours_text_document"),
        }
    print(json_text(result, indent=2))


def compare_tools(source: Path, folder: Path, n_documents: int, args: argparse.Namespace) -> dict[str, object]:
    """Wall time of whole commands, imports and start of workers included; medians over alternating rounds."""
    common = ["--input", str(source), "--vocab-file", args.vocab_file, "--merge-file", args.merge_file]
    common += ["--workers", str(args.workers), "--output-prefix"]
    ours = [str(TOOL), *common, str(folder / "ours"), "--tokenizer", "gpt2", "--append-eod", "--overwrite"]
    theirs = [__file__, "--reference", *common, str(folder / "theirs")]
    seconds: dict[str, list[float]] = {"ours": [], "megatron": []}
    for _ in range(args.rounds):
        for name, command in (("megatron", theirs), ("ours", ours)):
            start = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - start)
    ours_s, theirs_s = (statistics.median(seconds[name]) for name in ("ours", "megatron"))
    return {
        "ids_equal": _same_files(folder / "ours_text_document", folder / "theirs_text_document"),
        "ours_wall_s": round(ours_s, 2),
        "megatron_wall_s": round(theirs_s, 2),
        "ours_documents_per_s": round(n_documents / ours_s),
        "megatron_documents_per_s": round(n_documents / theirs_s),
        "ratio": round(theirs_s / ours_s, 1),
    }


def run_reference(args: argparse.Namespace) -> None:
    """What Megatron-LM's preprocess_data.py does with --tokenizer-type HuggingFaceTokenizer and --append-eod."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder  # heavy, and this side's cost

    n_tokens = len(json.loads(Path(args.vocab_file).read_text(encoding="utf-8")))
    builder = IndexedDatasetBuilder(f"{args.output_prefix}_text_document.bin", dtype=DType.optimal_dtype(n_tokens))
    with (
        open(args.input, encoding="utf-8") as file,
        multiprocessing.Pool(args.workers, _Reference.start, (args.vocab_file, args.merge_file)) as pool,
    ):
        for ids in pool.imap(_Reference.encode, file, 32):
            builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(f"{args.output_prefix}_text_document.idx")


class _Reference:
    """Holds a worker's tokenizer, as a class attribute: Megatron-LM's way."""

    tokenizer: Callable
    eod: int

    @classmethod
    def start(cls, vocab_file: str, merge_file: str) -> None:
        from transformers import GPT2TokenizerFast  # in the worker, where it is needed

        tokenizer = GPT2TokenizerFast(vocab_file, merge_file)
        cls.tokenizer, cls.eod = tokenizer, tokenizer.eos_token_id

    @classmethod
    def encode(cls, line: str) -> list[int]:
        ids = cls.tokenizer(json.loads(line)["text"]).input_ids
        return [*ids, cls.eod] if ids else []


def compare_encoders(texts: list[str], args: argparse.Namespace) -> dict[str, float]:
    """MB/s on one core, over at most 20 MB."""
    within = np.cumsum([len(text) for text in texts]) < 20e6
    sample = [text for text, is_within in zip(texts, within, strict=True) if is_within]
    megabytes = sum(len(text.encode()) for text in sample) / 1e6
    ours = Gpt2Tokenizer(Path(args.vocab_file), Path(args.merge_file))
    library = tokenizers.Tokenizer(models.BPE.from_file(args.vocab_file, args.merge_file))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    speeds = {}
    for name, encode in (
        ("gigatoken, at first sight", ours.encode_batch),
        ("gigatoken, again", ours.encode_batch),
        ("tokenizers", lambda batch: [library.encode_batch_fast([text])[0].ids for text in batch]),
    ):
        start = time.perf_counter()
        encode(sample)
        speeds[name] = round(megabytes / (time.perf_counter() - start), 1)
    return speeds


def compare_reads(prefix: Path, n_reads: int = 50_000, length: int = 1025) -> dict[str, float]:
    """Reading a sample from the page cache, to int64: by pread, as we do, and through a memory map."""
    dataset = IndexedDataset(prefix)
    mapped = np.memmap(dataset.bin_path, dataset.dtype, "r")
    rows = np.random.default_rng(0).integers(0, len(dataset), n_reads).tolist()
    lengths = np.minimum(dataset.lengths, length).tolist()
    starts = (dataset.pointers // dataset.dtype.itemsize).tolist()

    def timed(read: Callable[[int], np.ndarray]) -> float:
        start = time.perf_counter()
        for row in rows:
            read(row).astype(np.int64)
        return round((time.perf_counter() - start) / n_reads * 1e6, 2)

    return {
        "pread": timed(lambda row: dataset.get(row, 0, lengths[row])),
        "memory map": timed(lambda row: mapped[starts[row] : starts[row] + lengths[row]]),
    }


def _write_library(path: Path) -> Path:
    """The Python standard library as JSON lines, a file a document."""
    root = Path(sysconfig.get_paths()["stdlib"])
    with open(path, "w", encoding="utf-8") as file:
        for source in sorted(root.rglob("*.py")):
            if "site-packages" not in source.parts:
                text = source.read_bytes().decode("utf-8", errors="replace")
                file.write(json.dumps({"text": text}) + "\n")
    return path


def _train_bpe(texts: list[str], folder: Path) -> tuple[str, str]:
    """vocab.json and merges.txt of GPT-2's kind and size, for a machine that has not got GPT-2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=50257,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[END_OF_TEXT],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    vocab_file, merge_file = tokenizer.model.save(str(folder))
    return vocab_file, merge_file


def _same_files(ours: Path, theirs: Path) -> bool:
    return all(Path(f"{ours}{s}").read_bytes() == Path(f"{theirs}{s}").read_bytes() for s in (".bin", ".idx"))


def _parse() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--input", metavar="FILE", help="JSON lines with a text key (default: the standard library)")
    parser.add_argument("--vocab-file", metavar="FILE", help="GPT-2's vocab.json (default: train one)")
    parser.add_argument("--merge-file", metavar="FILE", help="GPT-2's merges.txt")
    parser.add_argument("--workers", type=int, default=2, help="processes of each side (default: 2)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, alternating (default: 3)")
    parser.add_argument("--reference", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--output-prefix", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    run_cli(main)
