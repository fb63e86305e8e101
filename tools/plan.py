"""Which layout, and how much memory: show the plan of a run without starting it, and without torch.

python tools/plan.py --preset gpt2-xl --world-size 40 --tp 5 --pp 4 --precision bf16
"""

from __future__ import annotations

from dataclasses import replace

from megagpt.cli import parse_run_config
from megagpt.console import console_here, show
from megagpt.errors import ArgumentParser, run_cli
from megagpt.plan.plan import make_plan
from megagpt.plan.table import config_table, plan_table

DESCRIPTION = """Show stages, memory and batch arithmetic of a run without starting it.
  python tools/plan.py --preset gpt2-xl --world-size 40 --tp 5 --pp 4 --precision bf16

It takes the flags of examples/pretrain_gpt.py, and
  --world-size N   number of processes; default tp * pp
  --preset NAME    start from a published model: {presets}
  --config FILE    read a YAML file; may be given several times"""

GPT2_VOCABULARY = 50257


def main() -> int:
    """Parse, plan, print."""
    own, rest = _own_flags().parse_known_args()
    config = parse_run_config(rest, prog="tools/plan.py", description=DESCRIPTION)
    note = None
    if config.model.vocab_size is None:
        note = f"note: the vocabulary is taken as GPT-2's, {GPT2_VOCABULARY}; --vocab-size sets it"
        config = replace(config, model=replace(config.model, vocab_size=GPT2_VOCABULARY))
    smallest = config.parallel.tp * config.parallel.pp
    plan = make_plan(config, smallest if own.world_size is None else own.world_size)
    console = console_here()
    show(console, config_table(config))
    show(console, plan_table(config, plan))
    if note:
        console.print(note)
    return 0


def _own_flags() -> ArgumentParser:
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--world-size", type=int)
    return parser


if __name__ == "__main__":
    run_cli(main)
