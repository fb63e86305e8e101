"""Compiles csrc/*.cu without a GPU: by nvcc for its report, and as C++ under cuda_emulation.h to run on the CPU.

python -m tests.ops.cuda_build softcap                      both for one op, then its cases over the emulated kernels
python -m tests.ops.cuda_build bias_dropout_add dropout     the same for an op that calls another one
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
TORCH = Path(torch.__file__).parent
INCLUDES = [
    "-std=c++20",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    f"-I{ROOT / 'csrc'}",
    f"-I{TORCH / 'include'}",
    f"-I{TORCH / 'include' / 'torch' / 'csrc' / 'api' / 'include'}",
]
ARCHITECTURES = ("80", "90")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one architecture."""

    kernel: str
    architecture: str
    registers: int
    spilled_bytes: int
    stack_bytes: int


def nvcc_report(source: Path, folder: Path) -> list[Usage]:
    """Compile one .cu for every architecture, its host code only read; what its kernels use."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = ["-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xptxas", "-v", *targets, *INCLUDES]
    done = _run(["nvcc", "-fatbin", *flags, str(source), "-o", str(folder / f"{source.stem}.fatbin")])
    return parse_report(done.stderr + done.stdout)


def parse_report(text: str) -> list[Usage]:
    """ptxas -v's lines: entry function, stack and spills, registers."""
    entry = re.compile(
        r"Compiling entry function '(?P<kernel>[^']*)' for 'sm_(?P<arch>\d+)'.*?"
        r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
        r"Used (?P<registers>\d+) registers",
        re.DOTALL,
    )
    return [
        Usage(
            _demangled(m["kernel"]), m["arch"], int(m["registers"]), int(m["stores"]) + int(m["loads"]), int(m["stack"])
        )
        for m in entry.finditer(text)
    ]


def build_emulated(sources: list[Path], library: Path) -> Path:
    """Compile .cu files for the CPU into one library that stands in for csrc's (MEGAGPT_EMULATED_CUDA)."""
    return compile_emulated([*sources, ROOT / "csrc" / "branches.cpp"], library, shared=True)


def compile_emulated(sources: list[Path], output: Path, *, shared: bool) -> Path:
    """Compile CUDA sources as C++ under cuda_emulation.h, two at a time, and link them."""
    compiler = os.environ.get("CXX", "g++").split()
    flags = ["-fPIC", "-O1", "-w", "-DMEGAGPT_EMULATED_CUDA", f"-I{ROOT / 'tests' / 'ops'}", *INCLUDES]
    objects = [output.with_name(f"{source.stem}.o") for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        _run([*compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, sources, objects))
    libraries = ["-shared", f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"] if shared else []
    _run([*compiler, *map(str, objects), *libraries, "-o", str(output)])
    return output


def run_emulated(library: Path, *pytest_arguments: str) -> subprocess.CompletedProcess[str]:
    """The tests of every op, and of the dropout masks' bits, in a process that has loaded the emulated kernels."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", "tests/ops/test_every_op.py", "tests/ops/test_dropout.py", *pytest_arguments],
        cwd=ROOT,
        env=os.environ | {"MEGAGPT_EMULATED_CUDA": str(library)},
        capture_output=True,
        text=True,
        check=False,
    )


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in (done.stderr + done.stdout).splitlines() if "error" in line]
        raise AssertionError("\n".join(errors[:3]) or done.stderr[-2000:])
    return done


def _demangled(name: str) -> str:
    """_ZN7megagpt…softcap_packsIfEE… -> softcap_packs<float>."""
    if shutil.which("c++filt") is None:
        return name
    text = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout
    return re.sub(r"megagpt::|c10::|::|\(.*|void |\n", "", text.replace("(anonymous namespace)", ""))


def main(op: str, *others: str) -> int:
    """Compile and run one op, and say what each of its kernels uses; `others` are ops that it calls."""
    sources = [ROOT / "csrc" / f"{name}.cu" for name in (op, *others)]
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which("nvcc") and sources[0].exists():
            for usage in nvcc_report(sources[0], Path(folder)):
                spilled = f"{usage.spilled_bytes:4} bytes spilled {usage.stack_bytes:4} of stack"
                print(f"sm_{usage.architecture} {usage.registers:4} registers {spilled}  {usage.kernel}")
        built = build_emulated([source for source in sources if source.exists()], Path(folder) / "emulated.so")
        done = run_emulated(built, "-k", f"{op}-")
        print(done.stdout[-3000:], done.stderr[-2000:])
        return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
