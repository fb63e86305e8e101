"""Show what is in a dataset, decode parts of it, verify it.

examples:
  python tools/inspect_data.py data/corpus_text_document
  python tools/inspect_data.py data/corpus_text_document --document 12
  python tools/inspect_data.py data/corpus_text_document --sample 0 --seq-len 1024
  python tools/inspect_data.py data/corpus_text_document --verify
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megagpt.config import DataConfig
from megagpt.config.values import Split
from megagpt.data.indexed.dataset import IndexedDataset, verify
from megagpt.data.indexed.meta import DatasetMeta, losses
from megagpt.data.indexed.samples import GPTSamples, split_bounds
from megagpt.data.tokenizers.tokenizer import KINDS, Tokenizer, tokenizer_for
from megagpt.errors import ArgumentParser, UserError, home_expanded, run_cli

_BAR = 50
_NOTHING = {True: "not measured", False: "hardly anything"}


def main(argv: Sequence[str] | None = None) -> int:
    args = _parse(argv)
    prefix = args.prefix.removesuffix(".idx").removesuffix(".bin")
    dataset = IndexedDataset(prefix)
    if args.verify:
        verify(dataset, args.vocab_size)
        print(f"{prefix}: verified: index, size, {dataset.n_tokens:,} tokens{_hashed(dataset.meta)}")
    elif args.document is not None:
        _show_document(dataset, args.document, _tokenizer(args, prefix))
    elif args.sample is not None:
        _show_sample(dataset, args, _tokenizer(args, prefix))
    else:
        _show_counts(dataset, dataset.meta)
        _show_lengths(dataset.lengths)
    return 0


def _show_counts(dataset: IndexedDataset, meta: DatasetMeta | None) -> None:
    rows: dict[str, Any] = {
        "dataset": dataset.prefix,
        "documents": f"{len(dataset.document_indices) - 1:,}",
        "sequences": f"{len(dataset):,}",
        "tokens": f"{dataset.n_tokens:,}",
        "dtype": dataset.dtype.name,
        "tokenizer": "not recorded: no .json beside the data",
    }
    if meta is not None:
        rows |= {
            "tokenizer": f"{meta.tokenizer}, vocabulary of {meta.vocab_size:,}",
            "its files": ", ".join(meta.tokenizer_files) or "none",
            "its SHA-256": meta.tokenizer_sha256,
            "end of document": _describe_eod(meta),
            "text": f"{meta.text_bytes / 1e6:,.1f} MB, {meta.text_bytes / meta.tokens:.2f} bytes a token",
            "not kept of it": "; ".join(losses(meta)) or _NOTHING[meta.lost_share is None],
        }
    for name, value in rows.items():
        print(f"{name:16} {value}")


def _describe_eod(meta: DatasetMeta) -> str:
    if meta.eod is None:
        return "the tokenizer has none"
    return f"id {meta.eod}, {'appended to each document' if meta.append_eod else 'not appended'}"


def _show_lengths(lengths: np.ndarray) -> None:
    """Bars over powers of two."""
    if not len(lengths):
        return
    bins = np.floor(np.log2(np.maximum(lengths, 1))).astype(int)
    counts = np.bincount(bins)
    print(f"\ntokens a sequence: {lengths.min():,} to {lengths.max():,}, median {int(np.median(lengths)):,}")
    for power in range(int(bins.min()), len(counts)):
        bar = "█" * round(_BAR * counts[power] / counts.max())
        low = 0 if power == 0 else 2**power
        print(f"{low:>11,} to {2 ** (power + 1) - 1:<11,} {counts[power]:>12,} {bar}")


def _show_document(dataset: IndexedDataset, number: int, tokenizer: Tokenizer | None) -> None:
    n_documents = len(dataset.document_indices) - 1
    if not 0 <= number < n_documents:
        raise UserError(f"--document {number}: {dataset.prefix} has documents 0 to {n_documents - 1}")
    first, stop = (int(i) for i in dataset.document_indices[number : number + 2])
    tokens = np.concatenate([np.zeros(0, dataset.dtype), *(dataset.get(i) for i in range(first, stop))])
    print(f"document {number}: {len(tokens):,} tokens\n{_text(tokens, tokenizer)}")


def _show_sample(dataset: IndexedDataset, args: argparse.Namespace, tokenizer: Tokenizer | None) -> None:
    documents = split_bounds(args.split, len(dataset))[0]
    samples = GPTSamples(
        dataset, documents=documents, num_samples=args.num_samples, seq_len=args.seq_len, seed=args.seed
    )
    if not 0 <= args.sample < len(samples):
        raise UserError(f"--sample {args.sample}: there are samples 0 to {len(samples) - 1}; see --num-samples")
    for document, offset, length in samples.documents_of(args.sample):
        print(f"── sample {args.sample}: tokens {offset:,} to {offset + length - 1:,} of sequence {document}")
        print(_text(dataset.get(document, offset, length), tokenizer))


def _text(tokens: np.ndarray, tokenizer: Tokenizer | None) -> str:
    if tokenizer is None:
        return " ".join(map(str, tokens.tolist()))
    too_large = tokens[tokens >= tokenizer.vocab_size]
    if too_large.size:
        raise UserError(
            f"token {too_large[0]} is not in the {tokenizer.kind} tokenizer; name the one that wrote the data"
        )
    return tokenizer.decode(tokens.tolist())


def _tokenizer(args: argparse.Namespace, prefix: str) -> Tokenizer | None:
    named = DataConfig(
        tokenizer=args.tokenizer,
        tokenizer_model=args.tokenizer_model,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
    )
    tokenizer = tokenizer_for(named, Path(prefix))
    if tokenizer is None:
        print("note: the tokenizer is not recorded, ids follow; name it with --tokenizer", file=sys.stderr)
    return tokenizer


def _hashed(meta: DatasetMeta | None) -> str:
    return ", SHA-256 of both files" if meta else " (no .json, so no hashes to compare)"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("prefix", type=home_expanded, help="prefix of the dataset, without .bin or .idx")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--document", type=int, metavar="N", help="decode document N")
    what.add_argument("--sample", type=int, metavar="N", help="decode training sample N, naming its documents")
    what.add_argument("--verify", action="store_true", help="check the index, every token, and the hashes")
    order = parser.add_argument_group("the order of samples, as in training")
    order.add_argument("--seq-len", type=int, default=256, help="tokens a sample (default: 256)")
    order.add_argument("--seed", type=int, default=1234, help="seed of the run (default: 1234)")
    order.add_argument(
        "--split", type=Split.parse, default="949,50,1", help="shares of train, validation, test (default: 949,50,1)"
    )
    order.add_argument("--num-samples", type=int, default=1, help="samples of the run (default: one epoch)")
    words = parser.add_argument_group("the tokenizer, where the .json does not name it")
    words.add_argument("--tokenizer", choices=KINDS)
    model = "sentencepiece: X.model; hf: tokenizer.json"
    words.add_argument("--tokenizer-model", metavar="FILE", type=home_expanded, help=model)
    words.add_argument("--vocab-file", metavar="FILE", type=home_expanded, help="gpt2: vocab.json")
    words.add_argument("--merge-file", metavar="FILE", type=home_expanded, help="gpt2: merges.txt")
    words.add_argument("--vocab-size", type=int, metavar="V", help="with --verify: tokens must be below V")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_cli(main)
