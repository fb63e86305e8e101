"""setup.py on small sources: what fails to build fails with its first error, and the rest is built."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NINJA = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")

BY_PYBIND11 = ("index_builder", "normal")
MODULE = 'extern "C" void* PyInit__%s() { return nullptr; }\n'
OP = 'extern "C" int on_cpu() { return 1; }\n'
CUDA_OP = 'extern "C" int on_cuda() { return 2; }\n'
# A torch for CUDA 13.0, whatever the installed one is for.
CUDA_TORCH = """
import runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = "13.0", sys.argv.pop(1)
runpy.run_path("setup.py", run_name="__main__")
"""
# ... that does not take this host compiler.
REFUSING_TORCH = CUDA_TORCH.replace(
    "runpy.run_path",
    """
def refuse(*_):
    raise RuntimeError("gcc 99 is too new for CUDA 13.0\\nand more")
cpp_extension._check_cuda_version = refuse
runpy.run_path""",
)


@pytest.fixture(scope="module")
def setup():
    """setup.py as a module: its functions, without running setup()."""
    spec = importlib.util.spec_from_file_location("megagpt_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path) -> Path:
    """A repository of a few sources that compile at once."""
    for folder in ("csrc", "megagpt", "stub"):
        (tmp_path / folder).mkdir()
    (tmp_path / "megagpt" / "__init__.py").touch()
    for name in BY_PYBIND11:
        (tmp_path / "csrc" / f"{name}.cpp").write_text(MODULE % name)
    (tmp_path / "csrc" / "op.cpp").write_text(OP)
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "megagpt"\nversion = "0"\n[tool.setuptools]\npackages = ["megagpt"]\n'
    )
    shutil.copy(ROOT / "setup.py", tmp_path)
    return tmp_path


@needs_compiler
def test_a_good_build_says_little(tree):
    run = build(tree)
    assert run.returncode == 0 and len((run.stdout + run.stderr).splitlines()) <= 5, run.stdout + run.stderr
    assert library(tree).on_cpu() == 1


@needs_compiler
def test_an_error_shows_its_first_lines_and_where_the_rest_is(tree):
    build(tree)
    assert built(tree) == {"_C", "_index_builder", "_normal"}
    (tree / "csrc" / "op.cpp").write_text("int a() {\n  return missing_name;\n}\nint b() { return also_missing; }\n")
    run = build(tree)
    shown = run.stdout + run.stderr
    assert run.returncode == 0 and len(shown.splitlines()) <= 10, shown
    assert "\ncsrc/op.cpp:2:10: error: " in shown and "return missing_name;" in shown and "also_missing" not in shown
    assert "megagpt._C not built: it does not compile" in shown and "build/build.log" in shown
    assert "also_missing" in (tree / "build" / "build.log").read_text()
    assert built(tree) == {"_index_builder", "_normal"}, "an older library stands in for sources that do not compile"
    required = build(tree, MEGAGPT_REQUIRE_EXT="1")
    assert required.returncode != 0 and "csrc/op.cpp:2:10: error: " in required.stderr


@needs_compiler
def test_cuda_sources_are_built_beside_those_of_the_same_name(tree):
    compile_as_cpp = f'while [ "$1" != -o ]; do shift; done; exec c++ -fPIC -x c++ -c {tree}/csrc/op.cu -o "$2"'
    home = nvcc(tree, compile_as_cpp)
    for name in ("c10_cuda", "torch_cuda", "cudart"):
        command = ["c++", "-shared", "-x", "c++", os.devnull, "-o", str(tree / "stub" / f"lib{name}.so")]
        subprocess.run(command, check=True)
    run = build(tree, home, LIBRARY_PATH=str(tree / "stub"), TORCH_CUDA_ARCH_LIST="8.0;9.0+PTX")
    assert "not built" not in run.stderr and built(tree) == {"_C", "_index_builder", "_normal"}, run.stderr
    assert b"on_cpu" in binary(tree) and b"on_cuda" in binary(tree)
    (named,) = {word for word in log(tree).split() if word.startswith("-DMEGAGPT_CUDA_ARCHITECTURES=")}
    assert set(named.partition("=")[2].split("+")) == {"sm_80", "sm_90", "compute_90"}


@needs_compiler
def test_cpu_kernels_are_built_where_cuda_sources_do_not_compile(tree):
    home = nvcc(tree, "echo 'csrc/op.cu(1): error: identifier \"x\" is undefined' >&2; exit 2")
    run = build(tree, home)
    assert run.returncode == 0 and 'csrc/op.cu(1): error: identifier "x" is undefined' in run.stderr
    assert "CUDA kernels not built: it does not compile" in run.stderr and len(run.stderr.splitlines()) <= 4, run.stderr
    assert library(tree).on_cpu() == 1
    required = build(tree, home, MEGAGPT_REQUIRE_EXT="1")
    assert required.returncode != 0 and "CUDA kernels not built" in required.stderr


@needs_compiler
@pytest.mark.parametrize("release", ["12.4", None])
def test_cpu_kernels_are_built_where_the_toolkit_does_not_fit(tree, release):
    home = nvcc(tree, "exit 1", release) if release else tree / "nowhere"
    (tree / "csrc" / "op.cu").write_text(CUDA_OP)
    run = build(tree, home)
    (line,) = [line for line in run.stderr.splitlines() if "CUDA kernels not built" in line]
    assert "install the CUDA toolkit 13.x" in line and (not release or "12.4" in line)
    assert library(tree).on_cpu() == 1


@needs_compiler
def test_cpu_kernels_are_built_where_torch_refuses_the_host_compiler(tree):
    run = build(tree, nvcc(tree, "exit 1"), program=REFUSING_TORCH)
    (line,) = [line for line in run.stderr.splitlines() if "not built" in line]
    assert "CUDA kernels not built: gcc 99 is too new for CUDA 13.0. GPUs run" in line
    assert library(tree).on_cpu() == 1


def test_without_a_compiler_nothing_is_built_and_one_line_says_so(tree):
    run = build(tree, CXX="no-such-compiler")
    assert run.returncode == 0 and built(tree) == set()
    (line,) = [line for line in run.stderr.splitlines() if "not built" in line]
    assert "no C++ compiler on the PATH (no-such-compiler)" in line and "install g++" in line


@needs_compiler
def test_without_ninja_it_takes_longer_and_says_so(tree):
    (tree / "bin").mkdir()
    for tool in ("c++", "as", "ld", "cc1plus", "sh"):
        if found := shutil.which(tool):
            (tree / "bin" / tool).symlink_to(found)
    run = build(tree, PATH=str(tree / "bin"))
    assert "no ninja on the PATH" in run.stderr and library(tree).on_cpu() == 1, run.stderr


@needs_compiler
def test_a_build_after_one_that_was_killed(tree):
    """Killed while an object is half written: nothing waits for a lock, nothing takes the half for the whole."""
    slow = tree / "slow"
    slow.write_text(
        '#!/bin/sh\ncase "$*" in *csrc/op.cpp*) while [ "$1" != -o ]; do shift; done; printf half > "$2"\n'
        f'touch {tree}/half; sleep 60;; esac\nexec c++ "$@"\n'
    )
    slow.chmod(0o755)
    process = start(tree, CXX=str(slow))
    deadline = time.monotonic() + 60
    while not (tree / "half").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.2)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    run = build(tree)
    assert run.returncode == 0 and built(tree) == {"_C", "_index_builder", "_normal"}, run.stderr
    assert library(tree).on_cpu() == 1


ERRORS = {
    "gcc": (
        "[1/2] c++ -O3 op.cpp\nIn file included from a.h:1:\n{root}/csrc/op.cpp:3:5: error: 'x' was not declared\n"
        "    3 |   x;\n      |   ^\ncsrc/op.cpp:9:1: error: another\n",
        "csrc/op.cpp:3:5: error: 'x' was not declared\n    3 |   x;\n      |   ^",
    ),
    "missing header": (
        "csrc/a.h:1:10: fatal error: b.h: No such file or directory\n    1 | #include\n",
        "csrc/a.h:1:10: fatal error: b.h: No such file or directory\n    1 | #include",
    ),
    "nvcc": (
        "x\ncsrc/op.cu(7): error: expected a ;\n   x\n   ^\n\n1 error",
        "csrc/op.cu(7): error: expected a ;\n   x\n   ^",
    ),
    "nvcc's options": (
        "nvcc fatal   : Unsupported gpu architecture 'compute_35'\nninja: stopped",
        "nvcc fatal   : Unsupported gpu architecture 'compute_35'",
    ),
    "no place": (
        "cc1plus: fatal error: x.cpp: No such file\ncompilation terminated.",
        "cc1plus: fatal error: x.cpp: No such file",
    ),
    "linker": (
        "/usr/bin/ld: cannot find -lcudart: No such file\ncollect2: error: ld returned 1 exit status",
        "/usr/bin/ld: cannot find -lcudart: No such file",
    ),
    "a warning is none": ("a.cpp:1:1: warning: error-prone\nkilled\n", "a.cpp:1:1: warning: error-prone\nkilled"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_first_error(setup, case):
    log_text, wanted = ERRORS[case]
    assert setup.first_error(log_text.replace("{root}", os.getcwd())) == wanted


def nvcc(tree: Path, script: str, release: str = "13.0") -> Path:
    """A toolkit with an nvcc of this release that otherwise does what the script says; its CUDA_HOME."""
    (tree / "csrc" / "op.cu").write_text(CUDA_OP)
    file = tree / "cuda" / "bin" / "nvcc"
    file.parent.mkdir(parents=True)
    version = f"Cuda compilation tools, release {release}, V{release}.1"
    file.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo "{version}"; exit;; esac\n{script}\n')
    file.chmod(0o755)
    return tree / "cuda"


def start(tree: Path, cuda_home: Path | None = None, program: str = CUDA_TORCH, **env: str) -> subprocess.Popen[str]:
    """setup.py in a process group of its own."""
    command = ["-c", program, str(cuda_home)] if cuda_home else ["setup.py"]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MEGAGPT", "TORCH_CUDA")) and k != "CXX"}
    return subprocess.Popen(
        [sys.executable, *command, "build_ext", "--inplace"],
        cwd=tree,
        env=kept | {"PATH": NINJA} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def build(
    tree: Path, cuda_home: Path | None = None, program: str = CUDA_TORCH, **env: str
) -> subprocess.CompletedProcess[str]:
    process = start(tree, cuda_home, program, **env)
    out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def built(tree: Path) -> set[str]:
    return {file.name.partition(".")[0] for file in (tree / "megagpt").glob("*.so")}


def binary(tree: Path) -> bytes:
    (file,) = (tree / "megagpt").glob("_C*.so")
    return file.read_bytes()


def library(tree: Path) -> ctypes.CDLL:
    (file,) = (tree / "megagpt").glob("_C*.so")
    return ctypes.CDLL(str(file))


def log(tree: Path) -> str:
    return (tree / "build" / "build.log").read_text()


def test_make_runs_where_the_path_has_a_space(tmp_path):
    """The Makefile's own paths; .venv holds stand-ins that say what they were asked to do."""
    checkout = tmp_path / "a b" / "main"
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", checkout)
    for name in ("python", "deepspeed", "ruff"):
        program = checkout / ".venv" / "bin" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@"\necho "$PATH:$TORCH_EXTENSIONS_DIR"\n')
        program.chmod(0o755)
    (checkout / ".venv" / ".ready").touch()
    for target, wanted in (("plan", "python tools/plan.py"), ("train", "deepspeed --quiet"), ("format", "ruff check")):
        done = subprocess.run(
            ["make", "-o", ".venv/.ready", target, "ARGS=--tp 2"], cwd=checkout, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert wanted in done.stdout
        assert f"{checkout}/.venv/bin:" in done.stdout and f":{checkout}/.venv/torch_extensions" in done.stdout
