"""The command line of a run: defaults < --preset < --config files < flags; checks run once all are merged."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, get_args, get_type_hints

import tyro

from megagpt.cli.yaml_file import Values, read_yaml, suggest, unchecked_config, with_source
from megagpt.config import SECTIONS, RunConfig
from megagpt.errors import UserError
from megagpt.presets import preset_names, preset_path

DESCRIPTION = """Train a GPT with tensor, pipeline and data parallelism.
  deepspeed examples/pretrain_gpt.py --tp 2 --pp 2           a small model on a corpus that every machine has
  deepspeed examples/pretrain_gpt.py --preset gpt2-small --data-path my_text_document --train-steps 20000
  deepspeed examples/pretrain_gpt.py --config run.yaml --lr 3e-4       a file, and what differs from it

Every setting has a flag --section.name (--parallel.tp), the frequent ones a short one too (--tp). The same
names make a YAML file: sections with keys. Later ones win: defaults, --preset, each --config, flags.
  --preset NAME    start from a published model: {presets}
  --config FILE    read a YAML file; may be given several times

tools/plan.py takes the same flags and shows stages and memory without starting anything."""

# What users of Megatron-LM and of Hugging Face would type: our name for it.
FOREIGN = {
    "--num-layers": "--n-layers",
    "--hidden-size": "--d-model",
    "--num-attention-heads": "--n-heads",
    "--ffn-hidden-size": "--model.d-ff",
    "--seq-length": "--seq-len",
    "--tensor-model-parallel-size": "--tp",
    "--pipeline-model-parallel-size": "--pp",
    "--train-iters": "--train-steps",
    "--max-steps": "--train-steps",
    "--learning-rate": "--lr",
    "--lr-warmup-iters": "--warmup-steps",
    "--clip-grad": "--clip",
    "--bf16": "--precision bf16",
    "--fp16": "--precision fp16",
    "--gradient-checkpointing": "--recompute",
}


def parse_run_config(argv: Sequence[str], *, prog: str | None = None, description: str = DESCRIPTION) -> RunConfig:
    """The configuration that the arguments (without the program's name) ask for.

    Raises: UserError, one line, for an unknown flag, key or preset, a wrong type and a refused value.
    `--help` prints and raises SystemExit(0). What launchers append (--local_rank, --deepspeed) is ignored.
    """
    own, rest = _own_flags().parse_known_args(list(argv))
    paths = [preset_path(own.preset)] if own.preset else []
    paths += [Path(p) for p in own.config]
    sources = [(str(path), read_yaml(path)) for path in paths]
    try:
        return _parse_flags(rest, sources, prog, description.format(presets=", ".join(preset_names())))
    except UserError as error:
        raise with_source(error, sources) from None


def all_flags() -> dict[str, list[str]]:
    """Dotted key → its flags, the short one first, as typed (--parallel.tp, hyphens for underscores)."""
    flags = {}
    for section, section_type in get_type_hints(RunConfig).items():
        hints = get_type_hints(section_type, include_extras=True)
        for field in dataclasses.fields(section_type):
            key = f"{section}.{field.name}"
            aliases = [a for extra in get_args(hints[field.name])[1:] for a in getattr(extra, "aliases", None) or ()]
            flags[key] = [*aliases, f"--{key.replace('_', '-')}"]
    return flags


def _parse_flags(argv: list[str], sources: list[tuple[str, Values]], prog: str | None, description: str) -> RunConfig:
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            config, unknown = tyro.cli(
                RunConfig,
                args=argv,
                prog=prog,
                description=description,
                default=unchecked_config(values for _, values in sources),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if not stop.code:
            raise  # --help
        raise UserError(f"{_first_paragraph(printed.getvalue())}; see --help") from None
    if unknown:
        raise UserError(_explain_unknown(unknown[0]))
    return config


def _first_paragraph(box: str) -> str:
    """The message of tyro's framed error, on one line, without frame, title and advice."""
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    end = next((i for i, line in enumerate(lines) if line.startswith(("─", "╰"))), len(lines))
    return " ".join(lines[:end]).removeprefix("Error parsing ").rstrip(".")


def _explain_unknown(argument: str) -> str:
    name = argument.split("=")[0]
    if not name.startswith("-"):
        return f"got {argument!r}, which belongs to no flag; every value follows its --flag"
    if name in FOREIGN:
        return f"unknown flag {name}; here it is {FOREIGN[name]}"
    known = [flag for flags in all_flags().values() for flag in flags]
    known += ["--preset", "--config", *(f"--{section}" for section in SECTIONS)]
    return f"unknown flag {name}{suggest(name.replace('_', '-'), known)}"


class _OwnFlags(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _own_flags() -> argparse.ArgumentParser:
    """The flags that are not settings: where settings come from, and what launchers append."""
    parser = _OwnFlags(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--local_rank", "--local-rank")
    parser.add_argument("--deepspeed", action="store_true")
    return parser
