#!/usr/bin/env python3
"""Serve a trained model over HTTP, as OpenAI's API: docs/generation.md.

    python examples/serve.py --load runs/a
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def ", "max_tokens": 40}'

Several processes (torchrun --nproc-per-node 4 …) share a large model by tensor parallelism, or as --pp and --dp say.
SIGTERM or Ctrl-C: what is under way is finished, nothing new is taken.
"""

import argparse
import importlib

from megagpt.errors import ArgumentParser
from megagpt.serve import check_installed
from megagpt.train.pretrain import run_program


def main() -> None:
    """Serve until a signal comes."""
    parser = ArgumentParser(description=__doc__)
    model, limits, door = (parser.add_argument_group(name) for name in ("model", "limits", "door"))
    model.add_argument(
        "--load", required=True, help="run folder, RUN@best, RUN@STEP, checkpoint, or transformers folder"
    )
    model.add_argument("--load-fallback", action="store_true", help="where it is damaged, take the one before it")
    model.add_argument("--weights", choices=("last", "ema"), default="last", help="ema: their moving average")
    model.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of weights and cache (default: fp32)"
    )
    model.add_argument("--pp", type=int, default=1, help="pipeline stages (default: 1)")
    model.add_argument("--dp", type=int, default=1, help="replicas, which share out the requests (default: 1)")
    model.add_argument("--name", help="what clients call the model (default: the last part of --load)")
    limits.add_argument("--batch", type=int, default=16, help="texts written at once, in each replica (default: 16)")
    limits.add_argument("--max-waiting", type=int, default=256, help="texts that may wait beside these (default: 256)")
    limits.add_argument("--max-body-kib", type=int, default=1024, help="size of a request (default: 1024)")
    door.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, for this machine)")
    door.add_argument("--port", type=int, default=8000, help="0: a free one, which is said (default: 8000)")
    door.add_argument("--api-key-file", help="file with the key that clients must bring (default: none is asked for)")
    parser.add_argument("--local-rank", help=argparse.SUPPRESS)  # what launchers append
    given = vars(parser.parse_args())
    del given["local_rank"]
    check_installed()
    # Only now, when what it needs is there.
    server = importlib.import_module("megagpt.serve.server")
    server.serve(server.Settings(**given))


if __name__ == "__main__":
    run_program(main)
