"""Holds docs/architecture.md's rule "imports flow one way" over the ASTs, imports inside functions included.

Every finding names file:line and the rule. The rules below are tested themselves, on trees that break them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

# A module imports from lower layers and from itself. Within a layer of LAYERS, modules may know each other...
LAYERS = (
    {"errors", "kernels", "config", "config_file", "cli", "metrics", "metrics_file", "presets", "schedule"},
    {"plan", "checkpoint"},
    {"ops", "parallel", "data"},
    {"watch"},
    {"model"},
    {"engine"},
    {
        "train",
        "trained",
        "evaluate",
        "generate",
        "factorised_run",
        "hf_export",
        "hf_import",
        "report",
        "run",
        "plot",
        "preflight",
        "launch",
        "parity",
        "parity_rank",
    },
)
STRANGERS = {"ops", "parallel", "data"}  # ... except these.
PROGRAMS = ("tools", "examples", "benchmarks")  # above every layer

WITHOUT_TORCH = LAYERS[0] | LAYERS[1] | {"plot"}  # and what they import of megagpt
HEAVY = {"torch", "deepspeed", "transformers", "megatron", "apex"}

# Packages, and compiled modules, that only these files or folders import.
ONLY_IN = {
    "deepspeed": ("megagpt/engine/", "megagpt/train/pretrain.py"),
    "apex": ("megagpt/engine/", "megagpt/ops/"),
    "megatron": ("benchmarks/",),
    "transformers": ("megagpt/hf/export_folder.py", "benchmarks/"),
    "wandb": ("megagpt/train/report.py",),
    "megagpt._C": ("megagpt/ops/library.py",),
    "megagpt._index_builder": ("megagpt/data/",),
}


def test_the_project_keeps_the_layers():
    findings = list(find_violations(REPOSITORY))
    assert not findings, "\n" + "\n".join(findings)


@dataclass(frozen=True)
class Import:
    """One import: of `target` (dotted), at file:line."""

    file: Path
    line: int
    target: str
    unexplained: bool = False
    """Inside a function, with no comment that says why."""


def find_violations(root: Path) -> Iterator[str]:
    """Yield "file:line: what; rule" for every import of megagpt or a program that breaks a rule."""
    files = sorted(f for top in ("megagpt", *PROGRAMS) for f in (root / top).rglob("*.py"))
    modules = {dotted_name(f.relative_to(root)): f for f in files}
    imports = {f: list(imports_of(f, root, modules)) for f in files}
    for file in files:
        place = file.relative_to(root).as_posix()
        for found in imports[file]:
            for rule in broken_rules(place, found):
                yield f"{place}:{found.line}: imports {found.target}; {rule}"
    for name, file in modules.items():
        if layer_name(name) in WITHOUT_TORCH:
            yield from heavy_imports(name, file, modules, imports, root)


def broken_rules(place: str, found: Import) -> Iterator[str]:
    """The rules that one import breaks by itself."""
    if found.unexplained:
        yield "an import inside a function carries a comment that says why (on its line or the one above)"
    for package, places in ONLY_IN.items():
        if (found.target + ".").startswith(package + ".") and not place.startswith(places):
            yield f"only {', '.join(places)} may import {package}"
    if found.target.split(".")[0] in PROGRAMS and place.startswith("megagpt/"):
        yield "megagpt does not know its programs"
    importer, imported = layer_name(dotted_name(Path(place))), layer_name(found.target)
    if not (importer and imported) or importer == imported:
        return
    unknown = [n for n in (importer, imported) if rank(n) is None]
    if unknown:
        if not any(found.target.startswith(module) for module in ONLY_IN):
            yield f"megagpt.{unknown[0]} has no place in LAYERS; give it one"
    elif rank(imported) > rank(importer):  # pyright: ignore[reportOptionalOperand] # not None: see above
        yield f"{importer} is below {imported}"
    elif {importer, imported} <= STRANGERS:
        yield f"{' and '.join(sorted(STRANGERS))} do not know each other"


def heavy_imports(name, file, modules, imports, root) -> Iterator[str]:
    """Follow what a torch-free module imports of megagpt; yield the chain that reaches a heavy package."""
    queue, seen = [(file, name)], {file}
    for current, chain in queue:
        place = current.relative_to(root).as_posix()
        targets = [Import(current, 1, parent) for parent in parents(dotted_name(Path(place)))]
        for found in targets + imports[current]:
            if found.target.split(".")[0] in HEAVY:
                rule = f"{layer_name(name)} works without torch"
                yield f"{place}:{found.line}: {chain} -> {found.target}; {rule}"
            for package in parents(found.target):
                target = modules.get(package)
                if target and target not in seen:
                    seen.add(target)
                    queue.append((target, f"{chain} -> {package}"))


def imports_of(file: Path, root: Path, modules: dict[str, Path]) -> Iterator[Import]:
    """Every import statement and importlib.import_module("constant") of a file."""
    source = file.read_text(encoding="utf-8")
    tree = ast.parse(source, filename=str(file))
    lines = source.splitlines()
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        targets = dict.fromkeys(targets_of(node, file.relative_to(root), modules))
        line = getattr(node, "lineno", 0)
        explained = "#" in "".join(lines[max(line - 2, 0) : line])
        for target in targets:
            yield Import(file, line, target, unexplained=id(node) in hidden and not explained)


def targets_of(node: ast.AST, place: Path, modules: dict[str, Path]) -> Iterator[str]:
    """The dotted names that a node imports; `from a import b` is a.b where that is a module, else a."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = place.with_suffix("").parts[: -node.level]
            base = ".".join([*package, *([base] if base else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            yield whole if whole in modules or whole in ONLY_IN or base == "megagpt" else base
    elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = getattr(node.func, "attr", getattr(node.func, "id", None))
        if function in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
            yield node.args[0].value


def dotted_name(place: Path) -> str:
    """megagpt/ops/__init__.py -> megagpt.ops."""
    parts = place.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_name(module: str) -> str | None:
    """megagpt.ops.norm -> ops; None outside megagpt and for the bare package."""
    parts = module.split(".")
    return parts[1] if parts[0] == "megagpt" and len(parts) > 1 else None


def rank(name: str) -> int | None:
    return next((i for i, layer in enumerate(LAYERS) if name in layer), None)


def parents(module: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c: what importing it runs."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


BROKEN = {
    "upwards": ("megagpt/model/gpt.py", "from megagpt.engine import build", "model is below engine"),
    "relative": ("megagpt/model/gpt.py", "from ..engine import build", "model is below engine"),
    "of the package": ("megagpt/model/gpt.py", "from megagpt import engine", "model is below engine"),
    "strangers": ("megagpt/ops/norm.py", "import megagpt.parallel.axis", "do not know each other"),
    "hidden": (
        "megagpt/ops/norm.py",
        "def f():\n    # costly\n    import megagpt.engine",
        "ops is below engine",
    ),
    "by a call": (
        "megagpt/data/a.py",
        "import importlib\nimportlib.import_module('deepspeed.comm')",
        "only megagpt/engine/",
    ),
    "deepspeed": ("tools/a.py", "import deepspeed", "only megagpt/engine/"),
    "extension": ("megagpt/model/a.py", "from megagpt import _C", "only megagpt/ops/library.py"),
    "unexplained": ("tools/a.py", "def f():\n\n    import json", "says why"),
    "programs": ("megagpt/train/loop.py", "from tools import bench", "does not know its programs"),
    "new module": ("megagpt/misc/a.py", "import megagpt.errors", "megagpt.misc has no place in LAYERS"),
    "torch": ("megagpt/config.py", "import torch.nn", "config works without torch"),
    "torch behind": ("megagpt/cli.py", "from megagpt.errors import x", "errors -> torch; cli works without"),
    "torch in package": (
        "megagpt/plan/a.py",
        "import megagpt.presets.b",
        "presets -> torch; plan works without",
    ),
    "torch in own package": ("megagpt/plan/a.py", "import json", "megagpt.plan -> torch; plan works without"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_found(tmp_path: Path, case: str):
    place, source, rule = BROKEN[case]
    write(tmp_path, "megagpt/train/__init__.py", "import deepspeed\n")
    write(tmp_path, "megagpt/parallel/axis.py", "import torch\n")
    write(tmp_path, "megagpt/presets/b.py", "")
    if case == "torch behind":
        write(tmp_path, "megagpt/errors.py", "import torch\n")
    if case == "torch in package":
        write(tmp_path, "megagpt/presets/__init__.py", "import torch\n")
    if case == "torch in own package":
        write(tmp_path, "megagpt/plan/__init__.py", "import torch\n")
    write(tmp_path, place, source + "\n")
    findings = list(find_violations(tmp_path))
    line = len(source.splitlines())
    assert any(rule in f for f in findings), findings
    assert case.startswith("torch ") or findings[0].startswith(f"{place}:{line}: "), findings


def test_a_sound_tree_passes(tmp_path: Path):
    write(
        tmp_path,
        "megagpt/config.py",
        "from dataclasses import dataclass\nfrom megagpt.errors import UserError\n",
    )
    write(tmp_path, "megagpt/errors.py", "import sys\n")
    write(tmp_path, "megagpt/ops/a.py", "import torch\nfrom megagpt.ops import library\n")
    write(tmp_path, "megagpt/ops/library.py", "from megagpt import _C\n")
    write(tmp_path, "megagpt/engine/a.py", "import deepspeed\nfrom megagpt.model import gpt\n")
    write(tmp_path, "megagpt/model/gpt.py", "from megagpt.ops import a\nfrom megagpt.config import x\n")
    write(tmp_path, "tools/a.py", "def f():\n    import json  # only for --json\n")
    assert list(find_violations(tmp_path)) == []


def write(root: Path, place: str, text: str) -> None:
    file = root / place
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
