"""The flags of programs that open a trained model: which checkpoint, what it may lack, and whose tokenizer."""

from __future__ import annotations

import argparse
from contextlib import AbstractContextManager

from megagpt.checkpoint.strict import Allowed
from megagpt.data.tokenizers.flags import add_tokenizer_flags, named_tokenizer
from megagpt.errors import ArgumentParser, home_expanded
from megagpt.generate.trained import DTYPES, Trained, load_trained, open_trained
from megagpt.parallel.mesh import Mesh


def add_load_flags(parser: ArgumentParser, *, several: bool = False) -> None:
    """Add what `open_from` reads; several models: `load_from`."""
    add = parser.add_argument_group("the model").add_argument
    what = "run folder, RUN@best, RUN@STEP, checkpoint, or folder of transformers"
    add("--load", required=True, type=home_expanded, nargs="+" if several else None, help=what)
    add("--load-fallback", action="store_true", help="where it is damaged, take the one before it")
    add("--weights", choices=("last", "ema"), default="last", help="ema: their moving average")
    add("--allow-missing", action="store_true", help="first values for tensors that it lacks")
    add("--allow-unused", action="store_true", help="leave tensors that the model has no place for")
    add("--precision", choices=tuple(DTYPES), default="fp32", help="of weights and cache (default: fp32)")
    what = "adapters merged into it: run, checkpoint or folder of peft"
    add("--adapter", type=home_expanded, metavar="DIR", help=what)
    add("--pp", type=int, default=1, help="pipeline stages (default: 1)")
    add("--dp", type=int, default=1, help="replicas, which share out the work (default: 1)")
    add_tokenizer_flags(parser)


def allowed_by(args: argparse.Namespace) -> Allowed:
    """Tensors that only one of checkpoint and model may have."""
    return Allowed(args.allow_missing, args.allow_unused)


def open_from(args: argparse.Namespace) -> AbstractContextManager[Trained]:
    """Load what the flags say: see `open_trained`."""
    more = {"pp": args.pp, "dp": args.dp, "precision": args.precision, "adapter": args.adapter}
    return open_trained(args.load, args.load_fallback, args.weights, allowed_by(args), named_tokenizer(args), **more)


def load_from(args: argparse.Namespace, path: str, mesh: Mesh) -> Trained:
    """One of several models, on processes that are laid out: see `load_trained`."""
    tokenizer, allowed = named_tokenizer(args), allowed_by(args)
    more = {"precision": args.precision, "adapter": args.adapter}
    return load_trained(path, mesh, args.load_fallback, args.weights, allowed, tokenizer, **more)
