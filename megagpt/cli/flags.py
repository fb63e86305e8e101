"""The command line of a run: defaults < --preset < --config files < flags; checks run once all are merged."""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import re
import sys
import textwrap
import types
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megagpt.cli.yaml_file import Values, check_values, is_words, merged, read_yaml, suggest
from megagpt.config import SECTIONS, RunConfig, plain
from megagpt.errors import ArgumentParser, UserError
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

_SHORT_CHOICES = 24  # characters

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
    parser, switches = _parser(prog, description)
    given, unknown = parser.parse_known_args(argv)
    paths = [preset_path(given.preset)] if given.preset else []
    sources = [(str(path), read_yaml(path)) for path in [*paths, *map(Path, given.config)]]
    if given.help:
        _explain(switches, sources)
        parser.print_help()
        sys.exit(0)
    if unknown:
        raise UserError(_explain_unknown(unknown[0]))
    return merged([*sources, ("", _typed({key: value for key, value in vars(given).items() if "." in key}))])


def all_flags() -> dict[str, list[str]]:
    """Dotted key → its flags, the short one first, as typed (--parallel.tp, hyphens for underscores)."""
    found = {}
    for key, hint in _hints(include_extras=True).items():
        flag = key.replace("_", "-")
        short = [f"--{flag.split('.')[1]}"] if get_origin(hint) is Annotated else []
        found[key] = [*short, f"--{flag}"]
    return found


def field_helps(section: type) -> dict[str, str]:
    """Field → the text behind it, which the interpreter does not keep."""
    (node,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(node, ast.ClassDef)
    helps = {}
    for statement, following in pairwise(node.body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            assert isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant), statement.target.id
            helps[statement.target.id] = " ".join(str(following.value.value).split())
    return helps


class _Switch(argparse.Action):
    """--recompute and --no-recompute, --parallel.recompute and --parallel.no-recompute."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        self._off = [re.sub(r"^--(\w+\.)?", r"--\1no-", flag) for flag in option_strings]
        super().__init__([*option_strings, *self._off], dest, nargs=0, **options)

    def __call__(self, parser: object, namespace: object, values: object, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string not in self._off)


def _parser(prog: str | None, description: str) -> tuple[ArgumentParser, dict[str, argparse.Action]]:
    """A parser of all flags, and the action of each setting. Values stay text: `_typed` reads them."""
    presets = textwrap.fill(", ".join(preset_names()), 79, initial_indent=" " * 48, subsequent_indent=" " * 19).strip()
    parser = ArgumentParser(prog, "%(prog)s [-h] [OPTIONS]", description.format(presets=presets), add_help=False)
    hidden = argparse.SUPPRESS
    parser.add_argument("-h", "--help", action="store_true", help="show this help message and exit")
    parser.add_argument("--preset", help=hidden)  # the description has them
    parser.add_argument("--config", action="append", default=[], help=hidden)
    parser.add_argument("--local-rank", help=hidden)  # what launchers append
    parser.add_argument("--deepspeed", action="store_true", help=hidden)
    groups = {
        name: parser.add_argument_group(f"{name} options", section.__doc__)
        for name, section in get_type_hints(RunConfig).items()
    }
    flags, actions = all_flags(), {}
    for key, hint in _hints().items():
        options: dict[str, Any] = {"action": _Switch} if hint is bool else {"metavar": _metavar(hint)}
        if is_words(hint):
            options["nargs"] = "*"
        actions[key] = groups[key.split(".")[0]].add_argument(*flags[key], dest=key, default=hidden, **options)
    return parser, actions


def _hints(include_extras: bool = False) -> dict[str, Any]:
    """Dotted key → type."""
    return {
        f"{name}.{field}": hint
        for name, section in get_type_hints(RunConfig).items()
        for field, hint in get_type_hints(section, include_extras=include_extras).items()
    }


def _kinds(hint: Any) -> tuple[Any, ...]:
    """A union's types, or the one that it is."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _choices(hint: Any) -> list[Any]:
    return [choice for kind in _kinds(hint) if get_origin(kind) is Literal for choice in get_args(kind)]


def _metavar(hint: Any) -> str:
    """INT, FLOAT, the choices where they are short, TEXT."""
    if choices := ",".join(map(str, _choices(hint))):
        return f"{{{choices}}}" if len(choices) <= _SHORT_CHOICES else "NAME"
    kind = next(kind for kind in _kinds(hint) if kind is not types.NoneType)
    return {int: "INT", float: "FLOAT"}.get(kind, "WORD" if is_words(kind) else "TEXT")


def _explain(actions: dict[str, argparse.Action], sources: list[tuple[str, Values]]) -> None:
    """Give each setting its help: the text behind the field, and what it is without the flag."""
    helps = {name: field_helps(section) for name, section in get_type_hints(RunConfig).items()}
    values, hints = plain(RunConfig()), _hints()
    for _, set_there in sources:
        for section, keys in set_there.items():
            values[section] |= keys
    for key, action in actions.items():
        section, name = key.split(".")
        value = values[section][name]
        shown = " ".join(value) if isinstance(value, list | tuple) else value
        default = "" if shown in (None, "") else f" (default: {shown})"
        names = f"One of {', '.join(map(str, _choices(hints[key])))}. " if action.metavar == "NAME" else ""
        action.help = (names + helps[section][name] + default).replace("%", "%%")


def _typed(given: dict[str, Any]) -> Values:
    """The values of flags, checked as those of a file are."""
    values: Values = {}
    hints = _hints()
    for key, text in given.items():
        section, name = key.split(".")
        values.setdefault(section, {})[name] = _as_in_yaml(hints[key], text) if isinstance(text, str) else text
    try:
        return check_values(values, "", {key: flags[0] for key, flags in all_flags().items()})
    except UserError as error:
        error.remedy = "see --help"
        raise


def _as_in_yaml(hint: Any, text: str) -> Any:
    """What YAML would make of a flag's text; the text itself where it is none of that, for the check to refuse."""
    for kind in _kinds(hint):
        if kind is types.NoneType and text == "None":
            return None
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                return kind(text)
    return next((choice for choice in _choices(hint) if str(choice) == text), text)


def _explain_unknown(argument: str) -> str:
    name = argument.split("=")[0]
    if not name.startswith("-") or name == "--":
        return f"got {argument!r}, which belongs to no flag; every value follows its --flag"
    if name in FOREIGN:
        return f"unknown flag {name}; here it is {FOREIGN[name]}"
    known = [flag for flags in all_flags().values() for flag in flags]
    known += ["--preset", "--config", *(f"--{section}" for section in SECTIONS)]
    return f"unknown flag {name}{suggest(name, known)}"
