"""The CUDA kernels where no GPU is: nvcc compiles them and tells what they use; a CPU runs their arithmetic."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from megagpt.ops.library import MISSING_KERNELS
from tests.ops.cuda_build import ROOT, Usage, build_emulated, compile_emulated, nvcc_report, parse_report, run_emulated

SOURCES = sorted((ROOT / "csrc").glob("*.cu"))
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
needs_compiler = pytest.mark.skipif(MISSING_KERNELS is not None, reason=f"no compiled kernels: {MISSING_KERNELS}")

# 65,536 registers a multiprocessor: at 64 a thread a block of 1024 fits, at 128 two blocks of 256.
MOST_REGISTERS = 128
EXAMPLE = "softcap"


def slow_but_for_one(source: Path) -> tuple[pytest.MarkDecorator, ...]:
    """Ten seconds of a compiler for each of the others."""
    return () if source.stem == EXAMPLE else (pytest.mark.slow,)


@needs_nvcc
@pytest.mark.timeout(300)
@pytest.mark.parametrize("source", [pytest.param(s, id=s.stem, marks=slow_but_for_one(s)) for s in SOURCES])
def test_nvcc_compiles_for_both_architectures_without_spills(source: Path, tmp_path: Path):
    usages = nvcc_report(source, tmp_path)
    kernels = len(re.findall(r"__global__ ", source.read_text()))
    for architecture in ("80", "90"):
        seen = [u for u in usages if u.architecture == architecture]
        assert len(seen) >= kernels, f"sm_{architecture}: {len(seen)} kernels of {kernels} in the source"
    bad = [u for u in usages if u.spilled_bytes or u.stack_bytes or u.registers > MOST_REGISTERS]
    assert not bad, "\n".join(map(str, bad))


def test_the_report_is_read_right():
    text = (
        "ptxas info    : Compiling entry function '_Z1kPf' for 'sm_90'\n"
        "ptxas info    : Function properties for _Z1kPf\n"
        "    48 bytes stack frame, 44 bytes spill stores, 40 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
    )
    (usage,) = parse_report(text)
    assert (usage.architecture, usage.registers, usage.spilled_bytes, usage.stack_bytes) == ("90", 255, 84, 48)
    assert usage == Usage(usage.kernel, "90", 255, 84, 48)


@needs_compiler
@pytest.mark.timeout(600)
@pytest.mark.parametrize("which", [EXAMPLE, pytest.param("all", marks=pytest.mark.slow)])
def test_cuda_kernels_pass_every_case_on_an_emulated_gpu(tmp_path: Path, which: str):
    sources = [source for source in SOURCES if which in ("all", source.stem)]
    chosen = [] if which == "all" else ["-k", f"{which}-"]
    done = run_emulated(build_emulated(sources, tmp_path / "emulated.so"), *chosen)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout[-500:]


# What the emulation itself must show: a program per fault.
PROGRAM = """
#include "cuda_emulation.h"
constexpr int THREADS = 64, DYNAMIC = 0, YZ = 1;
__global__ void kernel(float* y) {
  static float values[64];
  emulation::has_static_shared(sizeof(values));
  values[threadIdx.x] = threadIdx.x;
  %s
  y[blockIdx.x * 64 + threadIdx.x] = values[63 - threadIdx.x];
}
int main() {
  float y[128];
  emulation::run(dim3(2, YZ), THREADS, DYNAMIC, 48 * 1024, [&] { kernel(y); });
  for (int i = 0; i < 128; ++i) {
    if (y[i] != 63 - i %% 64) return 1;
  }
  return 0;
}
"""


@needs_compiler
@pytest.mark.parametrize(
    ("limit", "message"),
    [
        pytest.param("THREADS = 1056", "threads in a block: got 1056, the most is 1024", id="threads"),
        pytest.param("YZ = 65536", "blocks in y or z: got 65536, the most is 65535", id="grid"),
        pytest.param(
            "DYNAMIC = 49152", "static and dynamic: got 49408, the most is 49152", id="shared memory, the sum"
        ),
        pytest.param("DYNAMIC = 49156", "dynamic shared memory: got 49156, the most is 49152", id="shared memory"),
    ],
)
def test_the_emulation_refuses_what_a_gpu_would(tmp_path: Path, limit: str, message: str):
    source, program = tmp_path / "program.cu", tmp_path / "program"
    name = limit.split()[0]
    text = re.sub(rf"\b{name} = \d+", limit, PROGRAM % "__syncthreads();")
    source.write_text(text)
    compile_emulated([source], program, shared=False)
    done = subprocess.run([program], capture_output=True, text=True, timeout=30, env=dict(os.environ), check=False)
    assert done.returncode == -6, done.stderr
    assert message in done.stderr


@needs_compiler
@pytest.mark.parametrize(
    ("barrier", "exit_code", "message"),
    [
        pytest.param("__syncthreads();", 0, "", id="right"),
        pytest.param("", 1, "", id="missing barrier"),
        pytest.param("if (threadIdx.x < 7) { __syncthreads(); }", 1, "", id="barrier of few, others gone"),
        pytest.param("if (threadIdx.x < 40) __syncwarp();", -6, "8 threads wait", id="barrier that not all reach"),
    ],
)
def test_the_emulation_shows_faults(tmp_path: Path, barrier: str, exit_code: int, message: str):
    source, program = tmp_path / "program.cu", tmp_path / "program"
    source.write_text(PROGRAM % barrier)
    compile_emulated([source], program, shared=False)
    done = subprocess.run([program], capture_output=True, text=True, timeout=30, env=dict(os.environ), check=False)
    assert done.returncode == exit_code, done.stderr
    assert message in done.stderr
