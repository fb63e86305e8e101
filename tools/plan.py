"""Which layout, how much memory, how long: without starting a run, and without torch.

python tools/plan.py --preset gpt2-xl --world-size 40 --tp 5 --pp 4 --precision bf16    # the plan of a run
python tools/plan.py --preset gpt3-175b --gpus 1024 --gpu a100-80g                      # the best layouts
"""

from __future__ import annotations

from argparse import Namespace
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from megagpt.cli import parse_run_config
from megagpt.config import RunConfig
from megagpt.console import console_here, show
from megagpt.errors import ArgumentParser, UserError, run_cli
from megagpt.plan.draw import draw
from megagpt.plan.machine import machine
from megagpt.plan.plan import make_plan
from megagpt.plan.search import POSSIBLE, TODAY, Search, runs_today, search
from megagpt.plan.search_report import Bill, run_command, search_page
from megagpt.plan.table import config_table, plan_table
from megagpt.schedule import Schedule

DESCRIPTION = """Show stages, memory and batch arithmetic of a run without starting it.
  python tools/plan.py --preset gpt2-xl --world-size 40 --tp 5 --pp 4 --precision bf16

It takes the flags of examples/pretrain_gpt.py, and
  --world-size N   number of processes; default tp * pp
  --preset NAME    start from a published model: {presets}
  --config FILE    read a YAML file; may be given several times

With --gpus it looks for the best layouts instead (docs/planning.md):
  python tools/plan.py --preset gpt3-175b --gpus 1024 --gpu a100-80g --tokens 300e9 --price 2

  --gpus N         number of GPUs
  --gpu NAME       h100-80g (default), a100-80g, …, or a file of tools/calibrate.py
  --network NAME   between nodes: infiniband-hdr-8, ethernet-1600, …
  --tokens X       of the whole run; default the configuration's
  --price X        of a GPU-hour
  --draw FILE      picture of the best schedule, .svg or .png"""

GPT2_VOCABULARY = 50257


def main() -> int:
    """Parse, plan, print."""
    own, rest = _own_flags().parse_known_args()
    config = parse_run_config(rest, prog="tools/plan.py", description=DESCRIPTION)
    note = None
    if config.model.vocab_size is None:
        note = f"note: the vocabulary is taken as GPT-2's, {GPT2_VOCABULARY}; --vocab-size sets it"
        config = replace(config, model=replace(config.model, vocab_size=GPT2_VOCABULARY))
    if own.gpus is not None:
        return _best_layouts(config, own, rest, note)
    smallest = config.parallel.tp * config.parallel.pp
    plan = make_plan(config, smallest if own.world_size is None else own.world_size)
    console = console_here()
    show(console, config_table(config))
    show(console, plan_table(config, plan))
    if note:
        console.print(note)
    return 0


def _best_layouts(config: RunConfig, own: Namespace, rest: list[str], note: str | None) -> int:
    """Look for the layouts that take least time, and show them. rest: the flags that made the configuration."""
    model, batch = config.model, config.train.global_batch_size
    on = machine(own.gpu, own.network)
    possible = search(model, own.gpus, batch, on, POSSIBLE)
    today: Search | None = None
    with suppress(UserError):  # the best possible is shown all the same
        today = search(model, own.gpus, batch, on, TODAY, runs_today)
    tokens = own.tokens or float(Schedule(config).total_tokens)
    command = run_command(today.best[0], " ".join(rest)) if today else ""
    console = console_here()
    show(console, search_page(today, possible, on, Bill(tokens, own.price), command))
    if note:
        console.print(note)
    if own.draw:
        draw(possible.best[0].job, own.draw)
        console.print(f"the schedule of the best possible layout is drawn in {own.draw}")
    return 0


def _own_flags() -> ArgumentParser:
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--world-size", type=int)
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--gpu", default="h100-80g")
    parser.add_argument("--network")
    parser.add_argument("--tokens", type=float)
    parser.add_argument("--price", type=float)
    parser.add_argument("--draw", type=Path)
    return parser


if __name__ == "__main__":
    run_cli(main)
