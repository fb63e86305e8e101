"""Imports flow one way: the layers of docs/architecture.md, read from that page and held over the whole import graph.

Every finding names file:line and the rule. The rules are tested themselves, on trees that break them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.repository.imports import PROGRAMS, Graph, Import, files_of, parents, read_graph

REPOSITORY = Path(__file__).parents[2]
PAGE, HEADING = "docs/architecture.md", "## Layers of the code"

# Programs that answer, with a message or a result, before torch is loaded or without it; the layers that the page
# marks "no torch" do all the same.
WITHOUT_TORCH = (
    "megagpt.train.pretrain", "examples.pretrain_gpt", "tools.plan", "tools.plan_check", "tools.preflight",
    "tools.checkpoint",
    "tools.average_checkpoints", "tools.factorize", "tools.plot_run", "tools.preprocess_data", "tools.inspect_data",
    "tools.config_reference", "tools.models_page", "tools.parity",
)  # fmt: skip
HEAVY = {"torch", "deepspeed", "transformers", "megatron", "apex"}

# Packages, and compiled modules, that only these folders import.
ONLY_IN = {
    "deepspeed": ("megagpt/train/step/deepspeed/",),
    "apex": ("megagpt/train/step/deepspeed/", "megagpt/optim/"),
    "megatron": ("benchmarks/",),
    "transformers": ("megagpt/hf/", "benchmarks/"),
    "wandb": ("megagpt/train/report.py",),
    **dict.fromkeys(("starlette", "uvicorn", "prometheus_client", "jinja2"), ("megagpt/serve/",)),
    "megagpt._C": ("megagpt/ops/",),
    "megagpt._index_builder": ("megagpt/data/",),
    "megagpt._normal": ("megagpt/philox.py",),
}
STARTED = {"tools.new_op"}  # programs in processes of their own, not imported
DEEPEST, FROM, TO = 12, "megagpt.train.loop", "megagpt.errors"  # modules one has to know of to know the first


@dataclass(frozen=True)
class Layers:
    """rank: room ("train.step", "tools") -> its line on the page. strangers: rooms between bars. no_torch: rooms.

    kinds: room of kinds, which declare where they stand -> the line down to which they import in functions, where they
    compute: the last one with a room of their folder.
    """

    rank: dict[str, int]
    strangers: set[str]
    no_torch: set[str]
    kinds: dict[str, int]

    @staticmethod
    def read(page: str) -> Layers:
        """The first code block under the heading: "rooms, with | between strangers    what; no torch"."""
        block = page.split(HEADING, 1)[1].split("```")[1].strip("\n")
        rank, strangers, no_torch, kinds = {}, set(), set(), set()
        for number, line in enumerate(block.splitlines()):
            names, _, what = re.sub(r" {2,}", "  ", line).partition("  ")
            rooms = re.split(r", | \| ", names)
            rank |= dict.fromkeys(rooms, number)
            strangers |= set(rooms) if "|" in names else set()
            no_torch |= set(rooms) if what.endswith("no torch") else set()
            kinds |= set(rooms) if what.startswith("kinds:") else set()
        down_to = {
            room.split(".")[0]: number for room, number in rank.items()
        }  # the page goes down: the last one stays
        return Layers(rank, strangers, no_torch, {room: down_to[room.split(".")[0]] for room in kinds})

    def room(self, module: str) -> str | None:
        """The narrowest room of the page that a module lies in; None where there is none."""
        inside = module.removeprefix("megagpt.")
        return next((place for place in reversed(parents(inside)) if place in self.rank), None)


def test_the_project_keeps_the_layers():
    findings = list(find_violations(REPOSITORY))
    assert not findings, f"{len(findings)}\n" + "\n".join(findings)


def find_violations(root: Path) -> Iterator[str]:
    """Yield "file:line: what; rule" for every import that breaks a rule, and what is wrong with the graph."""
    layers, graph, files = Layers.read((root / PAGE).read_text(encoding="utf-8")), read_graph(root), files_of(root)
    for name, imports in graph.items():
        place = files[name].relative_to(root).as_posix()
        for found in imports:
            for rule in broken_rules(name, place, found, layers):
                yield f"{place}:{found.line}: imports {found.target}; {rule}"
    known = {layers.room(name) for name in graph}
    yield from (f"{PAGE}: {room} is no room of megagpt; take it out" for room in layers.rank if room not in known)
    for name in [n for n in graph if n in WITHOUT_TORCH or layers.room(n) in layers.no_torch]:
        if chain := heavy_chain(name, graph):
            yield f"{chain}; {name} works without torch"
    graph = {
        name: [found for found in imports if found.when != "for types"]
        for name, imports in graph.items()
        if name.split(".")[0] == "megagpt"
    }
    cycle = find_cycle(graph)
    if cycle:
        yield f"{' -> '.join(cycle)}: a cycle; what both need belongs below both"
    elif FROM in graph and len(chain := longest_chain(FROM, TO, graph)) > DEEPEST:
        yield f"{' -> '.join(chain)}: {len(chain)} modules deep, wanted {DEEPEST} at most"


def broken_rules(name: str, place: str, found: Import, layers: Layers) -> Iterator[str]:
    """The rules that one import breaks by itself."""
    if found.when == "later" and not found.explained:
        yield "an import inside a function carries a comment that says why (on its line or the one above)"
    for package, places in ONLY_IN.items():
        if package in parents(found.target) and not place.startswith(places) and found.target not in STARTED:
            yield f"only {', '.join(places)} may import {package}"
    if not place.startswith("megagpt/"):
        return
    if found.target.split(".")[0] in (*PROGRAMS, "tests") and found.target not in STARTED:
        yield "megagpt knows neither its programs nor its tests"
    if not found.target.startswith("megagpt.") or found.target in ONLY_IN or found.when == "for types":
        return
    importer, target = layers.room(name), layers.room(found.target)
    for room, module in ((importer, name), (target, found.target)):
        if room is None and module != "megagpt":
            yield f"{module} has no place in the layers of {PAGE}; give it one"
    if importer is None or target is None or importer == target:
        return
    computes = importer in layers.kinds and found.when == "later"
    if layers.rank[target] > (layers.kinds[importer] if computes else layers.rank[importer]):
        yield f"{importer} is below {target}"
    elif {importer, target} <= layers.strangers and layers.rank[importer] == layers.rank[target]:
        yield f"{importer} and {target} do not know each other"


def heavy_chain(name: str, graph: Graph) -> str | None:
    """Follow all that importing a module runs; the shortest chain to a heavy package, None where there is none.

    What runs later (in a function, or by a name in a string) is left out where a comment says so.
    """
    queue, seen = [(module, module) for module in parents(name) if module in graph], {name, *parents(name)}
    for module, chain in queue:
        for found in graph[module]:
            if found.when == "for types" or (found.when != "at once" and found.explained):
                continue
            if found.target.split(".")[0] in HEAVY and found.target not in STARTED:
                return f"{chain}:{found.line} -> {found.target}"
            for target in parents(found.target):
                if target in graph and target not in seen:
                    seen.add(target)
                    queue.append((target, f"{chain}:{found.line} -> {target}"))
    return None


def find_cycle(graph: Graph) -> list[str]:
    """Modules that import each other in a ring, whenever they do it; [] where there are none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for found in graph[module]:
            if found.target in graph and (ring := visit(found.target, [*path, module])):
                return ring
        done.add(module)
        return []

    return next((ring for module in graph if (ring := visit(module, []))), [])


def longest_chain(first: str, last: str, graph: Graph) -> list[str]:
    """The longest way from one module to another along imports; [] where there is none. For a graph without cycles."""
    known: dict[str, list[str]] = {last: [last]}

    def chain(module: str) -> list[str]:
        if module not in known:
            below = [chain(found.target) for found in graph[module] if found.target in graph]
            longest = max(below, key=len, default=[])
            known[module] = [module, *longest] if longest else []
        return known[module]

    return chain(first)


LOADED = """
import importlib, runpy, sys
sys.path.insert(0, "tools")
for name in sys.argv[1].split():
    importlib.import_module(name)
    assert "torch" not in sys.modules, f"importing {name} loads torch"
from megagpt.cli import parse_run_config
from megagpt.errors import UserError
for argv in (["--tp", "3"], ["--num-layers", "2"], ["--optim.optimizer", "muon"]):
    try:
        parse_run_config(argv)
    except UserError:
        pass
    assert "torch" not in sys.modules, f"checking {argv} loads torch"
sys.argv = ["tools/plan.py", "--preset", "tiny", "--tp", "2", "--world-size", "4"]
try:
    runpy.run_path("tools/plan.py", run_name="__main__")
except SystemExit as end:
    assert not end.code, end
assert "torch" not in sys.modules, "planning a run loads torch"
"""


def test_what_works_without_torch_does_not_load_it():
    """The same for real, the packages of others included: imports, checks of a configuration, a plan."""
    layers = Layers.read((REPOSITORY / PAGE).read_text(encoding="utf-8"))
    names = [n for n in files_of(REPOSITORY) if n in WITHOUT_TORCH or layers.room(n) in layers.no_torch]
    assert len(names) > len(WITHOUT_TORCH) + 10
    command = [sys.executable, "-c", LOADED, " ".join(names)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SMALL_PAGE = f"""# A page
{HEADING}

```
errors              a message; no torch
model.mlp           kinds: what each declares; no torch
config              settings; no torch
plan                sizes; no torch
ops | data          two strangers
model               layers
train.step          one door
train               the program
tools               command lines
```
"""
SOUND = {  # a tree that keeps every rule
    PAGE: SMALL_PAGE,
    "megagpt/__init__.py": "",
    "megagpt/errors.py": "import sys\n",
    "megagpt/config.py": "from megagpt.model.mlp import KINDS\nfrom megagpt.errors import UserError\n",
    "megagpt/model/mlp.py": (
        "if TYPE_CHECKING:\n    import torch\n    from megagpt.config import Config\n"
        "def f():\n    import torch  # where it computes\n    from megagpt.ops import norm  # likewise\n"
    ),
    "megagpt/plan/__init__.py": "",
    "megagpt/plan/plan.py": "from megagpt import config\n",
    "megagpt/ops/norm.py": "import torch\nfrom megagpt import _C\nfrom megagpt.errors import x\n",
    "megagpt/data/blend.py": "# opened when one is asked for\nKINDS = {\n    'gpt2': 'megagpt.data.gpt2:GPT2',\n}\n",
    "megagpt/data/gpt2.py": "import torch\n",
    "megagpt/model/gpt.py": "import torch\nfrom ..ops import norm\n",
    "megagpt/train/__init__.py": "",
    "megagpt/train/step/deepspeed/engine.py": "import deepspeed\nfrom megagpt.model import gpt\n",
    "megagpt/train/loop.py": "import megagpt.train.step.deepspeed.engine\n",
    "megagpt/train/pretrain.py": (
        "import importlib\nfrom megagpt.data.blend import KINDS\nfrom megagpt.plan.plan import make_plan\n"
        "def f():\n    # after the checks, which answer at once\n    importlib.import_module('megagpt.train.loop')\n"
    ),
    "tools/plan.py": "from megagpt.plan import plan\ndef f():\n    import json  # only for --json\n",
}  # fmt: skip
CHAIN = {f"megagpt/train/m{i}.py": f"import megagpt.train.m{i + 1}\n" for i in range(11)} | {
    "megagpt/train/m11.py": "import megagpt.errors\n",
    "megagpt/train/loop.py": "import megagpt.train.m0\n",
}
BROKEN = {
    "upwards": ({"megagpt/model/gpt.py": "from megagpt.train.loop import x"}, "model is below train"),
    "relative": ({"megagpt/model/gpt.py": "from ..train import loop"}, "model is below train"),
    "of the package": ({"megagpt/model/gpt.py": "from megagpt import train"}, "model is below train"),
    "within a folder": ({"megagpt/train/step/a.py": "import megagpt.train.loop"}, "train.step is below train"),
    "a kind that computes with too much": (
        {"megagpt/model/mlp.py": "def f():\n    # where it computes\n    import megagpt.train.loop"},
        "model.mlp is below train",
    ),
    "a kind that computes as it loads": (
        {"megagpt/model/mlp.py": "import megagpt.ops.norm"},
        "model.mlp is below ops",
    ),
    "a kind with torch": ({"megagpt/model/mlp.py": "import torch"}, "megagpt.model.mlp:1 -> torch; megagpt.config"),
    "the module beside kinds": ({"megagpt/config.py": "import megagpt.model.gpt"}, "config is below model"),
    "strangers": ({"megagpt/ops/norm.py": "import megagpt.data.gpt2"}, "ops and data do not know each other"),
    "hidden": ({"megagpt/ops/norm.py": "def f():\n    import megagpt.train  # costly"}, "ops is below train"),
    "by a call": ({"megagpt/ops/norm.py": "f('x')\nimport_module('megagpt.train.loop')"}, "ops is below train"),
    "by a table": ({"megagpt/ops/norm.py": "PRELOAD = (\n    'megagpt.train.loop',)"}, "ops is below train"),
    "deepspeed": ({"tools/a.py": "import deepspeed"}, "only megagpt/train/step/deepspeed/ may import"),
    "deepspeed by name": ({"megagpt/ops/a.py": "X = 'deepspeed.comm'"}, "only megagpt/train/step/deepspeed/"),
    "extension": ({"megagpt/model/a.py": "from megagpt import _C"}, "only megagpt/ops/ may import megagpt._C"),
    "unexplained": ({"tools/a.py": "def f():\n\n    import json"}, "says why"),
    "programs": ({"megagpt/train/loop.py": "from tools import plan"}, "knows neither its programs"),
    "tests": ({"megagpt/train/loop.py": "X = 1\nimport tests.soak.rank"}, "knows neither its programs"),
    "a new room": ({"megagpt/misc/a.py": "import megagpt.errors"}, "megagpt.misc.a has no place in the layers"),
    "torch": ({"megagpt/config.py": "import torch.nn"}, ":1 -> torch.nn; megagpt.config works without"),
    "torch below": ({"megagpt/errors.py": "import torch"}, "config:2 -> megagpt.errors:1 -> torch; megagpt.config"),
    "torch in a package": ({"megagpt/plan/__init__.py": "import torch"}, "-> torch; tools.plan works without"),
    "torch below a program": (
        {"megagpt/data/blend.py": "import torch"},
        "megagpt.train.pretrain:2 -> megagpt.data.blend:1 -> torch; megagpt.train.pretrain works without",
    ),
    "torch by a name that nobody explains": (
        {"megagpt/data/blend.py": "KINDS = {'gpt2': 'megagpt.data.gpt2:GPT2'}"},
        "megagpt.data.blend:1 -> megagpt.data.gpt2:1 -> torch; megagpt.train.pretrain works without",
    ),
    "a cycle": (
        {"megagpt/data/gpt2.py": "from megagpt.data import blend"},
        "megagpt.data.blend -> megagpt.data.gpt2 -> megagpt.data.blend: a cycle",
    ),
    "depth": (CHAIN, "megagpt.train.m11 -> megagpt.errors: 14 modules deep"),
    "a stale page": ({PAGE: SMALL_PAGE.replace("tools ", "tools, gone")}, "gone is no room of megagpt"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_found(tmp_path: Path, case: str):
    changes, rule = BROKEN[case]
    write(tmp_path, SOUND | changes)
    findings = list(find_violations(tmp_path))
    assert any(rule in finding for finding in findings), findings
    (place, source), *more = changes.items()
    if not more and place.endswith(".py") and not rule.startswith(("megagpt.", ":", "-", "config:")):
        assert findings[0].startswith(f"{place}:{len(source.splitlines())}: "), findings


def test_a_sound_tree_passes(tmp_path: Path):
    write(tmp_path, SOUND)
    assert list(find_violations(tmp_path)) == []


def write(root: Path, files: dict[str, str]) -> None:
    for place, text in files.items():
        (root / place).parent.mkdir(parents=True, exist_ok=True)
        (root / place).write_text(text)
