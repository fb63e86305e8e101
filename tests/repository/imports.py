"""The import graph of the repository: what every file imports, when, and by which line."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("tools", "examples", "benchmarks")
TOPS = ("megagpt", *PROGRAMS, "tests")  # whose names in strings are read as modules
DOTTED = re.compile(r"(\w+(?:\.\w+)+)(?::\w+)?")  # "a.b.c", or "a.b.c:Name"


@dataclass(frozen=True)
class Import:
    """One edge: `target` (a dotted name, of ours or not) is imported, or named in a string, on this line.

    when: "at once" with the module; "later" in a function; "by name" by whoever reads the string; "for types", which
    only a type checker does.
    explained: a comment stands on the line, the one above, or above the statement.
    """

    target: str
    line: int
    when: str = "at once"
    explained: bool = False


Graph = Mapping[str, list[Import]]


def files_of(root: Path) -> dict[str, Path]:
    """Dotted name -> file, of megagpt and of the programs."""
    return {dotted_name(f.relative_to(root)): f for top in ("megagpt", *PROGRAMS) for f in (root / top).rglob("*.py")}


def read_graph(root: Path) -> dict[str, list[Import]]:
    """Dotted name -> its imports, of every file of megagpt and of the programs."""
    files = files_of(root)
    return {name: list(imports_of(file, root, files)) for name, file in sorted(files.items())}


def imports_of(file: Path, root: Path, modules: Mapping[str, Path]) -> Iterator[Import]:
    """Every import statement of a file, and every string that is the name of a module."""
    source = file.read_text(encoding="utf-8")
    tree, lines = ast.parse(source, filename=str(file)), source.splitlines()
    place = file.relative_to(root)
    itself = dotted_name(place)

    def walk(node: ast.AST, statement: int, inside: str) -> Iterator[Import]:
        if isinstance(node, ast.stmt):
            statement = node.lineno
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            return  # a docstring
        line = getattr(node, "lineno", statement)
        explained = any("#" in text for i in (line, line - 1, statement - 1) for text in lines[max(i - 1, 0) : i])
        for target in dict.fromkeys(imported(node, place, modules)):
            yield Import(target, line, inside, explained)
        for target in dict.fromkeys(named(node, modules)):
            if target != itself:
                yield Import(target, line, "by name", explained)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            inside = "later"
        for child in ast.iter_child_nodes(node):
            typing = isinstance(node, ast.If) and child in node.body and ast.unparse(node.test) == "TYPE_CHECKING"
            yield from walk(child, statement, "for types" if typing else inside)

    yield from walk(tree, 1, "at once")


def imported(node: ast.AST, place: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    """The dotted names that a statement imports; `from a import b` is a.b where that is a module, else a."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            package = place.with_suffix("").parts[: -node.level]
            base = ".".join([*package, *([base] if base else [])])
        for alias in node.names:
            whole = f"{base}.{alias.name}"
            yield whole if whole in modules or base in ("megagpt", *PROGRAMS) else base


def named(node: ast.AST, modules: Mapping[str, Path]) -> Iterator[str]:
    """Names of modules in strings: what is given to import_module, dotted names of ours, and of DeepSpeed."""
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        function = getattr(node.func, "attr", getattr(node.func, "id", None))
        if function in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
            yield node.args[0].value
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        whole = DOTTED.fullmatch(node.value)
        if whole and (whole[1] in modules or whole[1].startswith("deepspeed.")):
            yield whole[1]


def dotted_name(place: Path) -> str:
    """megagpt/ops/__init__.py -> megagpt.ops."""
    parts = place.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parents(module: str) -> list[str]:
    """a.b.c -> a, a.b, a.b.c: what importing it runs."""
    parts = module.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
