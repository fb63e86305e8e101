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

from megagpt.cli.flags import all_flags, field_helps
from megagpt.cli.yaml_file import is_words
from megagpt.config import SECTIONS, RunConfig, plain
from megagpt.errors import run_cli
from megagpt.presets import preset_names, preset_path

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

*Written by `tools/config_reference.py` from the dataclasses of `megagpt/config`; change it there.*

A run has nine sections of settings. Each setting has a flag, `--section.name`; the frequent ones have a
short flag too. Hyphens and underscores are the same. A switch is turned off with `--no-name`
(`--no-recompute`).

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
code 2: `run.yaml: unknown key model.n_layer; did you mean model.n_layers?` Every run keeps its resolved
configuration, which `--config` reads back.

`tools/plan.py` takes the same flags, and `--world-size N`, and shows stages, memory and batch arithmetic
without starting anything.

`--deepspeed_config FILE` takes a DeepSpeed JSON for whatever has no setting here. A key in it that
contradicts a setting is an error that names both; one that is equal, or `"auto"`, is fine.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(reference(), encoding="utf-8")
    print(f"wrote {PAGE}")


def reference() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *_presets(), *(line for name in SECTIONS for line in _section(name))])


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
        typed = ", ".join(f"`{flag}`" for flag in flags[f"{name}.{field.name}"])
        default = defaults[field.name]
        shown = " ".join(default) if isinstance(default, list) else default
        default = "" if shown in (None, "") else f"`{shown}`"
        kind = _kind(hints[field.name]).replace("|", "\\|")
        yield f"| `{field.name}` | {typed} | {kind} | {default} | {helps[field.name].replace('|', '/')} |"
    yield ""


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
