"""The project runs nothing that it reads: no pickle, unsafe loader, shell or eval. And no `global`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FOLDERS = ("megagpt", "tools", "examples", "benchmarks", "tests")

CALLS = {  # function: what to use instead
    "pickle.load": "JSON or safetensors",
    "pickle.loads": "JSON or safetensors",
    "pickle.Unpickler": "JSON or safetensors",
    "torch.load": "safetensors",
    "yaml.load": "yaml.safe_load",
    "yaml.load_all": "yaml.safe_load_all",
    "yaml.full_load": "yaml.safe_load",
    "yaml.unsafe_load": "yaml.safe_load",
    "os.system": "subprocess.run([...])",
    "os.popen": "subprocess.run([...])",
    "subprocess.getoutput": "subprocess.run([...])",
    "eval": "ast.literal_eval or a table",
    "exec": "a function",
}
KEYWORDS = {  # keyword argument: the value that is refused
    "weights_only": False,
    "shell": True,
    "allow_pickle": True,
    "trust_remote_code": True,
}


def test_the_project_runs_nothing_it_reads():
    files = [REPOSITORY / "setup.py", *(f for d in FOLDERS for f in (REPOSITORY / d).rglob("*.py"))]
    findings = [finding for f in sorted(files) for finding in find_unsafe(f.read_text(encoding="utf-8"), f)]
    assert not findings, "\n" + "\n".join(findings)


def test_no_message_says_none():
    """OSErrors that libraries raise have no strerror; `os_reason` has a word for all."""
    files = {f for d in ("megagpt", "tools", "examples") for f in (REPOSITORY / d).rglob("*.py")}
    files.remove(REPOSITORY / "megagpt" / "files.py")
    found = sorted(str(f) for f in files if ".strerror" in f.read_text(encoding="utf-8"))
    assert not found, f"use os_reason of megagpt/files.py in {', '.join(found)}"


def find_unsafe(source: str, file: Path) -> Iterator[str]:
    """Yield "file:line: what; remedy" for every refused call, argument and `global` statement."""
    tree = ast.parse(source, filename=str(file))
    names = imported_names(tree)
    for node in ast.walk(tree):
        what = None
        if isinstance(node, ast.Global):
            what = f"global {', '.join(node.names)}; pass the state as an argument"
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
            called = full_name(node, names)
            what = f"{called}; use {CALLS[called]}" if called in CALLS else None
        elif isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant):
            value = node.value.value
            if node.arg in KEYWORDS and value is KEYWORDS[node.arg]:
                what = f"{node.arg}={value}; leave it at {not value}"
        if what:
            yield f"{file}:{node.lineno}: {what}"


def imported_names(tree: ast.AST) -> dict[str, str]:
    """What each imported name stands for: {"p": "pickle", "loads": "pickle.loads"}."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname: a.name for a in node.names if a.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def full_name(node: ast.expr, names: dict[str, str]) -> str:
    """The dotted name of an expression, with imports resolved; "" if it is not one."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        owner = full_name(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    return ""


UNSAFE = [
    "import pickle\npickle.loads(b)",
    "import pickle as p\np.load(f)",
    "from pickle import loads as innocent\ninnocent(b)",
    "import pickle\nload = pickle.load",
    "import torch\ntorch.load(f)",
    "load(f, weights_only=False)",
    "import yaml\nyaml.load(f, Loader=yaml.SafeLoader)",
    "import subprocess\nsubprocess.run(c, shell=True)",
    "import os\nos.system(c)",
    "eval(s)",
    "import numpy as np\nnp.load(f, allow_pickle=True)",
    "AutoModel.from_pretrained(n, trust_remote_code=True)",
    "def f():\n    global x",
]
SAFE = """
import pickle, subprocess, torch, yaml
model.eval()
yaml.safe_load(f)
pickle.dumps(x)
subprocess.run([a], shell=False)
torch.save(x, f)
load(f, weights_only=True)
text = "eval(s) and pickle.load in a string"
def eval_step(): ...
"""


@pytest.mark.parametrize("source", UNSAFE)
def test_unsafe_code_is_found(source: str):
    (finding,) = find_unsafe(source, Path("a.py"))
    assert finding.startswith(f"a.py:{len(source.splitlines())}: ")


def test_safe_code_passes():
    assert list(find_unsafe(SAFE, Path("a.py"))) == []
