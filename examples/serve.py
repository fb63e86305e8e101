#!/usr/bin/env python3
"""Serve a trained model over HTTP, as OpenAI's API: docs/generation.md.

    python examples/serve.py --load runs/a
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def ", "max_tokens": 40}'

Several processes (torchrun --nproc-per-node 4 …) share a large model by tensor parallelism, or as --pp and --dp say.
SIGTERM or Ctrl-C: what is under way is finished, nothing new is taken.
"""

import argparse
import importlib

from megagpt.data.tokenizers.flags import named_tokenizer
from megagpt.errors import ArgumentParser, home_expanded
from megagpt.generate.flags import add_load_flags, allowed_by
from megagpt.serve import check_installed
from megagpt.train.pretrain import run_program


def main() -> None:
    """Serve until a signal comes."""
    parser = ArgumentParser(description=__doc__)
    add_load_flags(parser)
    limits, door = (parser.add_argument_group(name) for name in ("limits", "door"))
    door.add_argument("--name", help="what clients call the model (default: the last part of --load)")
    limits.add_argument("--batch", type=int, default=16, help="texts written at once, in each replica (default: 16)")
    limits.add_argument("--max-waiting", type=int, default=256, help="texts that may wait beside these (default: 256)")
    limits.add_argument("--max-body-kib", type=int, default=1024, help="size of a request (default: 1024)")
    door.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, for this machine)")
    door.add_argument("--port", type=int, default=8000, help="0: a free one, which is said (default: 8000)")
    door.add_argument(
        "--api-key-file",
        type=home_expanded,
        help="file with the key that clients must bring (default: none is asked for)",
    )
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)  # what launchers append
    args = parser.parse_args()
    check_installed()
    # Only now, when what it needs is there.
    server = importlib.import_module("megagpt.serve.server")
    given = {name: value for name, value in vars(args).items() if name in server.FLAGS}
    server.serve(server.Settings(**given, allowed=allowed_by(args), tokenizer=named_tokenizer(args)))


if __name__ == "__main__":
    run_program(main)
