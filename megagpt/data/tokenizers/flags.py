"""The flags that name a tokenizer, for programs that open a run whose folder may not have it."""

from __future__ import annotations

import argparse

from megagpt.config import DataConfig
from megagpt.data.tokenizers.tokenizer import KINDS
from megagpt.errors import ArgumentParser, require


def add_tokenizer_flags(parser: ArgumentParser) -> None:
    """Add what `named_tokenizer` reads."""
    words = parser.add_argument_group("the tokenizer, where the run folder does not have it")
    words.add_argument("--tokenizer", choices=KINDS, help="its kind")
    words.add_argument("--tokenizer-model", metavar="FILE", help="sentencepiece: X.model; hf: tokenizer.json")
    words.add_argument("--vocab-file", metavar="FILE", help="gpt2: vocab.json")
    words.add_argument("--merge-file", metavar="FILE", help="gpt2: merges.txt")


def named_tokenizer(args: argparse.Namespace) -> DataConfig | None:
    """What the flags name; None where they name none.  Raises UserError for files without their kind."""
    files = {"tokenizer_model": args.tokenizer_model, "vocab_file": args.vocab_file, "merge_file": args.merge_file}
    for name, path in files.items():
        flag = f"--{name.replace('_', '-')} {path}"
        require(
            path is None or args.tokenizer is not None, flag, "needs to know the kind of tokenizer", "add --tokenizer"
        )
    return DataConfig(tokenizer=args.tokenizer, **files) if args.tokenizer else None
