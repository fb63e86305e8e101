"""Builds csrc/; everything else about the package is in pyproject.toml.

    pip install --no-build-isolation -e .        or        python setup.py build_ext --inplace

- `megagpt._index_builder` needs a C++ compiler and pybind11.
- `megagpt._C`, the ops, needs an importable torch too (hence no build isolation). CUDA sources are compiled
  iff nvcc and a CUDA torch are there; a GPU is not asked for, so that a login node can build.

What cannot be built is left out, with one line that says why: the package then runs its NumPy and PyTorch
fallbacks. MEGAGPT_REQUIRE_EXT=1 turns that into a failure.
"""

import os
import platform
import shutil
import sys
from contextlib import suppress
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

NO_PYBIND11 = NO_TORCH = ""
try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError as error:
    NO_PYBIND11 = f"pybind11 is not importable here ({error}); install it and run `make build`"
try:
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension as BaseBuild
except ImportError as error:
    from setuptools.command.build_ext import build_ext as BaseBuild

    NO_TORCH = f"torch is not importable here ({error}); install it and use --no-build-isolation"

INDEX_BUILDER = "csrc/index_builder.cpp"
OPS = sorted(set(glob("csrc/*.cpp")) - {INDEX_BUILDER})
FALLBACK = {"megagpt._index_builder": "NumPy code", "megagpt._C": "PyTorch reference code"}
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
# Only torch's stable ABI of 2.11 is used, so that one build loads into every later torch.
STABLE_ABI = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# Loops vectorise: no errno, no trapping, multiply and add in one instruction where there is one.
VECTORISE = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
X86 = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" and sys.platform != "darwin" else []
CXX_FLAGS = [*STABLE_ABI, "-O3", *VECTORISE, *X86, *OPENMP]
NVCC_FLAGS = [*STABLE_ABI, "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA"]


def index_builder() -> Extension:
    """The sample maps. No fused multiply-add (a default on ARM): it would choose other samples than NumPy."""
    flags = ["-O3", "-ffp-contract=off"]
    return Pybind11Extension("megagpt._index_builder", [INDEX_BUILDER], cxx_std=17, extra_compile_args=flags)


def op_library():
    """Every op of csrc/ in one library, with CUDA where that can be compiled."""
    headers = sorted(glob("csrc/*.h") + glob("csrc/*.cuh"))
    sources = list(OPS)
    kind, flags = cpp_extension.CppExtension, {"cxx": CXX_FLAGS}
    cuda_home = cpp_extension.CUDA_HOME  # None for a torch without CUDA
    if glob("csrc/*.cu") and cuda_home and shutil.which("nvcc", path=f"{cuda_home}/bin"):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # else torch would ask the GPUs present
        kind, flags = cpp_extension.CUDAExtension, {**flags, "nvcc": NVCC_FLAGS}
        sources += sorted(glob("csrc/*.cu"))
    return kind("megagpt._C", sources, depends=headers, extra_compile_args=flags, extra_link_args=OPENMP)


def explain(names: list[str], why: str) -> None:
    """Say in one line what is missing and what runs instead; fail if the extensions are required."""
    fallback = " and ".join(FALLBACK[name] for name in names)
    message = f"{' and '.join(names)} not built: {why}. Instead runs {fallback}."
    if os.environ.get("MEGAGPT_REQUIRE_EXT") == "1":
        sys.exit(f"error: {message} (MEGAGPT_REQUIRE_EXT=1 forbids that)")
    print(f"megagpt: {message}", file=sys.stderr, flush=True)


class Build(BaseBuild):
    """Builds each extension aside, moves it into place whole, and goes on without one that fails."""

    def run(self) -> None:
        if NO_PYBIND11:
            explain(["megagpt._index_builder"], NO_PYBIND11)
        if NO_TORCH:
            explain(["megagpt._C"], NO_TORCH)
        tried = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        compiler = next(filter(shutil.which, tried), None)
        if compiler is None:
            why = f"no C++ compiler on the PATH ({', '.join(tried)}); install g++ and run `make build`"
            self._leave_out(self.extensions, why)
            self.extensions = []
        else:
            os.environ.setdefault("CXX", compiler)  # one and the same for compiling and for linking
        super().run()

    def build_extension(self, ext) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        build_lib, self.build_lib = self.build_lib, f"{self.build_temp}/staged"
        staged = Path(self.get_ext_fullpath(ext.name))
        staged.unlink(missing_ok=True)  # half a library of a build that was killed would count as up to date
        try:
            super().build_extension(ext)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, target)
        except Exception as error:  # ninja, distutils and the OS each have a class of their own for this
            target.unlink(missing_ok=True)
            reason = str(error).partition("\n")[0]
            self._leave_out([ext], f"the compiler failed ({reason}; its output is above)")
        finally:
            self.build_lib = build_lib

    def copy_file(self, infile, outfile, *args, **kwargs):
        """The copy into the source tree, for --inplace: never half a library, never into a mapped one."""
        final = Path(outfile)
        partial = final.with_name(f".{final.name}")
        copied = super().copy_file(infile, partial, *args, **kwargs)
        os.replace(partial, final)
        return (outfile, copied[1])

    def _leave_out(self, left_out: list[Extension], why: str) -> None:
        for ext in left_out:
            ext.optional = True  # setuptools then misses nothing
            with suppress(FileNotFoundError):  # an older build must not stand in for the sources of today
                Path(self.get_ext_filename(ext.name)).unlink()
        explain([ext.name for ext in left_out], why)


extensions: list[Extension] = []
if not NO_PYBIND11:
    extensions.append(index_builder())
if not NO_TORCH:
    extensions.append(op_library())
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
