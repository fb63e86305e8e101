"""What `python -m megagpt.ops new` lays builds and is proven as it lies, and the proof fails once it is wrong."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megagpt.errors import UserError
from tools.new_op import EXAMPLE, FILES, LONGEST, lay, render

ROOT = Path(__file__).parents[2]
NAME = "a_new_op_of_the_longest_name_x"


@pytest.fixture(scope="module")
def untouched(tmp_path_factory) -> Path:
    """A copy of the repository for tests that leave it as it is."""
    root = tmp_path_factory.mktemp("repository")
    copy_repository(root)
    return root


@pytest.mark.slow
@pytest.mark.timeout(300)  # builds twice; half a minute on an idle machine
def test_what_is_laid_is_proven_and_what_is_wrong_is_found(tmp_path):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("no C++ compiler")
    copy_repository(tmp_path)
    laid = python(tmp_path, "-m", "megagpt.ops", "new", NAME)
    assert laid.returncode == 0 and f"make bench-kernels OP={NAME}" in laid.stdout, laid.stderr
    build(tmp_path)
    table = python(tmp_path, "-m", "megagpt.ops").stdout
    assert next(line for line in table.splitlines() if NAME in line).split()[1:] == ["cpu", "cpu", "kernel", "built"]
    proven = python(tmp_path, "-m", "pytest", "tests/ops/test_every_op.py", "-k", f"{NAME} and not compiles")
    assert proven.returncode == 0 and "passed" in proven.stdout and "skipped" not in proven.stdout, proven.stdout

    source = tmp_path / "csrc" / f"{NAME}.cpp"
    right = source.read_text()
    wrong = right.replace("return 1 - t * t;", "return 1 - t;    ")
    assert wrong != right
    source.write_text(wrong)
    build(tmp_path)
    refuted = python(tmp_path, "-m", "pytest", "tests/ops/test_every_op.py", "-k", f"{NAME}-odd and values")
    assert refuted.returncode == 1 and "gradient of x" in refuted.stdout, refuted.stdout


def test_what_is_laid_is_styled_and_says_todo_in_every_file_with_arithmetic(tmp_path):
    copy_repository(tmp_path)
    files = {file.relative_to(tmp_path).as_posix(): file.read_text() for file in lay(tmp_path, NAME)}
    assert list(files) == [f.format(NAME) for f in FILES]
    for name, text in files.items():
        assert not [left for left in (EXAMPLE, "Soft cap", "// formula", "# formula") if left in text]
        assert ("TODO" in text) == ("/cases/" not in name)
    for command in (["check"], ["format", "--check"]):
        style = python(tmp_path, "-m", "ruff", *command, "megagpt/ops", "tests/ops/cases")
        assert style.returncode == 0, style.stdout


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Gelu", "lower-case"),
        ("2d", "lower-case"),
        ("a-b", "lower-case"),
        ("../evil", "lower-case"),
        ("", "lower-case"),
        ("lambda", "lower-case"),
        ("a" * (LONGEST + 1), f"at most {LONGEST}"),
        ("softcap", "megagpt/ops/softcap.py is there already"),
        ("softcap_backward", "megagpt/ops/softcap.py is there already"),
        ("library", "megagpt/ops/library.py is there already"),
        ("common", "csrc/common.h is there already"),
        ("torch", "uses for something else"),
        ("cap", "uses for something else"),
    ],
)
def test_a_bad_name_is_refused_and_nothing_is_laid(untouched, name, says):
    before = tree(untouched)
    with pytest.raises(UserError, match=says):
        lay(untouched, name)
    assert tree(untouched) == before


def test_all_files_or_none(tmp_path, monkeypatch):
    copy_repository(tmp_path)
    before = tree(tmp_path)
    place = Path.open

    def full(self, *arguments, **keywords):
        if self.suffix == ".cu" and arguments == ("x",):
            raise OSError("No space left on device")
        return place(self, *arguments, **keywords)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match="No space left on device; nothing was laid"):
        lay(tmp_path, "mish")
    assert tree(tmp_path) == before


def test_elsewhere_it_says_where_to_run():
    run = python(ROOT / "docs", "-m", "megagpt.ops", "new", "mish", env={"PYTHONPATH": str(ROOT)})
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("error: ") and "run this in its root" in run.stderr


def test_every_replacement_still_finds_its_place():
    """A comment of softcap that was reworded would otherwise stay in what is laid."""
    text = "".join((ROOT / f.format(EXAMPLE)).read_text() for f in FILES)
    assert text.count("formula\n") >= 6
    python_file = next(iter(FILES)).format(EXAMPLE)
    assert render((ROOT / python_file).read_text(), "mish").startswith('"""mish: TODO')
    assert "TODO: your formula, in words." in render(text, "mish")


def test_the_code_that_the_guide_shows_is_that_of_the_example():
    guide = (ROOT / "docs" / "adding-a-kernel.md").read_text()
    sources = {line for f in FILES for line in (ROOT / f.format(EXAMPLE)).read_text().splitlines()}
    shown = re.findall(r"^```(?:python|cpp)\n(.*?)^```", guide, flags=re.DOTALL | re.MULTILINE)
    assert len(shown) >= 6
    assert not [line for block in shown for line in block.splitlines() if line not in sources]


def copy_repository(root: Path) -> None:
    """The parts that an op is made of, with no other op than softcap to compile."""
    for folder in ("megagpt", "tests/ops", "tools"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, root / folder, ignore=ignored)
    for file in (ROOT / "tests" / "ops" / "cases").glob("[!_]*.py"):
        if file.stem != EXAMPLE:
            (root / file.relative_to(ROOT)).unlink()
    (root / "csrc").mkdir()
    wanted = ["*.h", "*.cuh", "index_builder.cpp", "normal.cpp", "branches.cpp", f"{EXAMPLE}.*"]
    for file in (f for pattern in wanted for f in (ROOT / "csrc").glob(pattern)):
        shutil.copy(file, root / "csrc")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, root)


def build(root: Path) -> None:
    run = python(root, "setup.py", "build_ext", "--inplace", env={"MEGAGPT_REQUIRE_EXT": "1"})
    assert run.returncode == 0, run.stdout + run.stderr


def python(root: Path, *arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Python in a repository, its ninja on the PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "MEGAGPT", "PYTHONPATH"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=environment | {"PATH": path} | (env or {}),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


def tree(root: Path) -> set[str]:
    return {file.relative_to(root).as_posix() for file in root.rglob("*")}
