"""The command line of a run: defaults < --preset < --config files < flags; checks run once all are merged."""

from __future__ import annotations

import argparse
import ast
import contextlib
import inspect
import math
import re
import sys
import textwrap
import types
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from megagpt.cli.translate import Advice, advise, also_means_other, plain_name
from megagpt.cli.yaml_file import Values, check_values, is_words, merged, read_yaml
from megagpt.config import RunConfig, plain
from megagpt.errors import ArgumentParser, UserError, is_flag
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

Source = tuple[str, Values]
"""What an error message names, and what it sets."""


def parse_run_config(
    argv: Sequence[str],
    *,
    prog: str | None = None,
    description: str = DESCRIPTION,
    beneath: Callable[[list[Source]], list[Source]] = lambda sources: [],
) -> RunConfig:
    """The configuration that the arguments (without the program's name) ask for.

    beneath: what a program has in place of defaults, given all that is asked for; it is told of none for `--help`.
    Raises: UserError for unknown flags, all at once, and, one line, for a key, preset, type or value that is refused.
    `--help` prints and raises SystemExit(0). What launchers append (--local_rank, --deepspeed) is ignored.
    """
    parser, switches = _parser(prog, description)
    given, unknown = parser.parse_known_args(argv)
    paths = [preset_path(given.preset)] if given.preset else []
    sources: list[Source] = [(str(path), read_yaml(path)) for path in [*paths, *given.config]]
    if given.help:
        _explain(switches, [*beneath([]), *sources])
        parser.print_help()
        sys.exit(0)
    if unknown:
        raise _refusal(list(argv), parser, unknown)
    sources.append(("", _typed({key: value for key, value in vars(given).items() if "." in key})))
    return merged([*beneath(sources), *sources])


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


def _off(flag: str) -> str:
    """--recompute → --no-recompute, --model.bias-mlp → --model.no-bias-mlp."""
    return re.sub(r"^--(\w+\.)?", r"--\1no-", flag)


class _Switch(argparse.Action):
    """--recompute and --no-recompute, --parallel.recompute and --parallel.no-recompute."""

    def __init__(self, option_strings: Sequence[str], dest: str, **options: Any) -> None:
        self._off = [_off(flag) for flag in option_strings]
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
    parser.add_argument("--config", action="append", type=Path, default=[], help=hidden)
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


def _refusal(argv: list[str], parser: ArgumentParser, unknown: list[str]) -> UserError:
    """What is said of all words that belong to no flag of ours: what they are here, as far as we know."""
    given, strange = _scan(argv, parser)
    strange = strange or [("", word) for word in unknown]
    known = parser.flags()
    no_flag = Advice(note="every value follows its --flag; a switch has none: --recompute, --no-recompute")
    said = [
        (f"{name} {value}".strip(), advise(name, value, given, known) if name else no_flag) for name, value in strange
    ]
    said += also_means_other(given).items()
    if len(said) == 1:
        (name, value), ((_, one),) = strange[0], said
        what = f"unknown flag {name}" if name else f"got {value!r}, which belongs to no flag"
        return UserError(f"{what}; {_written(one, 'here it is ') or 'see --help for what there is'}")
    width = min(max(len(typed) for typed, _ in said), _LONGEST_TYPED)
    lines = [f"  {typed:<{width}}  {_written(one) or 'unknown'}" for typed, one in said]
    ours = " ".join(filter(None, (_typed_here(one) for _, one in said)))
    lines += [f"  those that are here, in one: {ours}"] if ours else []
    return UserError(f"{len(said)} flags are unknown; beneath, what each is here (--help has ours)", lines=lines)


_LONGEST_TYPED = 44  # characters, in a column


def _scan(argv: list[str], parser: ArgumentParser) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """All that stands there, by plain name; and, in their order, the flags that are not ours with their values.

    A word that belongs to no flag is one without a name.
    """
    given: dict[str, str] = {}
    strange: list[tuple[str, str]] = []
    name, room, words = "", 0.0, [""]  # what the next word is a value of; how many more it takes
    ours = parser.flags()
    for word in argv:
        if is_flag(word):
            name, equals, value = word.partition("=")
            words = [value] if equals else []
            flag = name.replace("_", "-")
            room = ours.get(flag, math.inf) - len(words)
            if flag not in ours:
                strange.append((name, value))
        elif room > 0:
            room, words = room - 1, [*words, word]
            if strange and strange[-1][0] == name:
                strange[-1] = (name, " ".join(words))
        else:
            strange.append(("--deepspeed" if name == "--deepspeed" else "", word))
        if name:
            given[plain_name(name)] = " ".join(words)
    return given, strange


def _typed_here(advice: Advice) -> str:
    return " ".join(as_flag(key, value) for key, value in advice.settings.items())


def _written(advice: Advice, here: str = "") -> str:
    """--n-layers 24, with `here` in front; or why there is nothing; "" where nothing is known."""
    if not advice.settings:
        return advice.note
    return here + _typed_here(advice) + (f" ({advice.note})" if advice.note else "")


def as_flag(key: str, value: str) -> str:
    """A setting as it is typed: --tp 2, --recompute, --model.no-bias-mlp."""
    flag = all_flags()[key][0]
    if _hints()[key] is bool:
        return flag if value == "True" else _off(flag)
    return f"{flag} {value}".strip()
