"""The flags of programs that open a trained model: which checkpoint, what it may lack, and whose tokenizer."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager

from megagpt.checkpoint.strict import Allowed
from megagpt.data.tokenizers.flags import add_tokenizer_flags, named_tokenizer
from megagpt.errors import ArgumentParser, home_expanded
from megagpt.generate.trained import Trained, open_trained


def add_load_flags(parser: ArgumentParser) -> None:
    """Add what `open_from` reads."""
    parser.add_argument(
        "--load", required=True, type=home_expanded, help="run folder, RUN@best, RUN@STEP, or checkpoint folder"
    )
    parser.add_argument("--load-fallback", action="store_true", help="where it is damaged, take the one before it")
    parser.add_argument("--weights", choices=("last", "ema"), default="last", help="ema: their moving average")
    parser.add_argument("--allow-missing", action="store_true", help="first values for tensors that it lacks")
    parser.add_argument("--allow-unused", action="store_true", help="leave tensors that the model has no place for")
    add_tokenizer_flags(parser)


def open_from(args: argparse.Namespace) -> AbstractContextManager[Trained]:
    """Load what the flags say: see `open_trained`."""
    allowed = Allowed(args.allow_missing, args.allow_unused)
    return open_trained(args.load, args.load_fallback, args.weights, allowed, named_tokenizer(args))
