"""Write docs/configuration.md from the dataclasses. A test holds it in step.

python tools/config_reference.py
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megagpt.cli.flags import all_flags, as_flag, field_helps
from megagpt.cli.peers import ABSENT, BY_ITSELF, CHOICES, SAME, SWITCHES
from megagpt.cli.translate import COMPUTED
from megagpt.cli.yaml_file import is_words
from megagpt.config import SECTIONS, RunConfig, plain
from megagpt.errors import ArgumentParser, run_cli
from megagpt.presets import preset_names, preset_path

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

*Written by `tools/config_reference.py` from the dataclasses of `megagpt/config`; change it there.*

A run has nine sections of settings. Each setting has a flag, `--section.name`; the frequent ones have a
short flag too. Hyphens and underscores are the same. A switch is turned off with `no-` before its name:
`--no-recompute`, or behind the section, `--model.no-bias-attention`; in a file it is `true` or `false`.

    deepspeed examples/pretrain_gpt.py --tp 2 --pp 2
    deepspeed examples/pretrain_gpt.py --preset gpt2-small --data-path my_text_document --precision bf16
    deepspeed examples/pretrain_gpt.py --config run.yaml --lr 3e-4

Later ones win: the defaults below, `--preset NAME`, each `--config FILE` in turn, flags. Values are checked
once all are merged, so a later one may mend an earlier one. A YAML file has the same names:

    model:
      n_layers: 12
      d_model: 768
    data:
      data_path: [0.7, wiki_text_document, 0.3, books_text_document]
    optim:
      lr: 3e-4

An unknown key or flag, a wrong type, a key that stands twice, NaN, an alias or a tag is one line and exit
code 2: `run.yaml: unknown key model.n_layer; did you mean model.n_layers?` Several unknown ones are told at
once, with what they are here ([what others call them](#what-others-call-them)). Numbers are those of YAML 1.2
without leading zeros, so that `010` and `1:30` are words. A path may begin with `~`. Every run keeps its
resolved configuration, which `--config` reads back.

`tools/plan.py` takes the same flags, and `--world-size N`, and shows stages, memory and batch arithmetic
without starting anything.

`--deepspeed_config FILE` takes a DeepSpeed JSON for whatever has no setting here. A key in it that
contradicts a setting is an error that names both; one that is equal, or `"auto"`, is fine.
"""


def main() -> None:
    """Write the page."""
    ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")


def reference() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_presets(), *(line for name in SECTIONS for line in _section(name)), *_peers()])


def _presets() -> Iterator[str]:
    yield "## Presets\n"
    yield "`--preset NAME`; each file in `megagpt/presets` tells its source and its quirks.\n"
    yield "| name | what it is |\n|---|---|"
    for name in preset_names():
        first_line = preset_path(name).read_text(encoding="utf-8").splitlines()[0]
        yield f"| `{name}` | {first_line.removeprefix('# ')} |"
    yield ""


def _section(name: str) -> Iterator[str]:
    section: type = get_type_hints(RunConfig)[name]
    hints, helps, flags, defaults = get_type_hints(section), field_helps(section), all_flags(), plain(section())
    yield f"## {name}\n\n{inspect.getdoc(section)}\n"
    yield "| setting | flags | type | default | meaning |\n|---|---|---|---|---|"
    for field in fields(section):
        typed = _listed(" ".join(flags[f"{name}.{field.name}"]))
        if hints[field.name] is bool:
            typed += f", `{as_flag(f'{name}.{field.name}', 'False')}`"
        default = defaults[field.name]
        shown = " ".join(default) if isinstance(default, list) else default
        default = "" if shown in (None, "") else f"`{shown}`"
        kind = _kind(hints[field.name]).replace("|", "\\|")
        yield f"| `{field.name}` | {typed} | {kind} | {default} | {helps[field.name].replace('|', '/')} |"
    yield ""


def _peers() -> Iterator[str]:
    yield "## What others call them\n"
    yield (
        "Flags and keys of Megatron-LM, GPT-NeoX, DeepSpeed, transformers and nanoGPT are no aliases, since their\n"
        "defaults differ; where one is typed, the error says what it is here, for all that are typed at once.\n"
        "With the same value:\n"
    )
    yield "| here | there |\n|---|---|"
    for key, names in SAME.items():
        yield f"| `{key}` | {_listed(names)} |"
    yield "\nWith another value:\n\n| there | here |\n|---|---|"
    for names, means in SWITCHES.items():
        yield f"| {_listed(names)} | {', '.join(f'`{as_flag(key, value)}`' for key, value in means.items())} |"
    for names, (key, words) in CHOICES.items():
        pairs = ", ".join(f"{word}: `{value}`" for word, value in words.items()).replace("|", "\\|")
        yield f"| {_listed(names)} | `{key}`: {pairs} |"
    yield f"| {_listed(' '.join(COMPUTED))} | worked out from what stands beside them |"
    yield "\nLeft out, since it is always so, or not here:\n\n| there | here |\n|---|---|"
    for why, names in (BY_ITSELF | ABSENT).items():
        yield f"| {_listed(names)} | {why} |"
    yield ""


def _listed(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split())


def _kind(hint: Any) -> str:
    """int, float, words … as a user would say it."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_kind(part) for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if is_words(hint):
        return "words"
    return {int: "integer", float: "number", bool: "switch"}.get(hint, "text")


if __name__ == "__main__":
    run_cli(main)
