"""Builds csrc/; everything else about the package is in pyproject.toml.

    pip install --no-build-isolation -e .        or        python setup.py build_ext --inplace

- `megagpt._index_builder` needs a C++ compiler.
- `megagpt._C`, the ops, needs an importable torch too (hence no build isolation). CUDA sources are compiled
  iff nvcc and a CUDA torch are there; a GPU is not asked for, so that a login node can build.

What cannot be built is left out, with one line that says why: the package then runs its NumPy and PyTorch
fallbacks. MEGAGPT_REQUIRE_EXT=1 turns that into a failure.
"""

import os
import shutil
import sys
from contextlib import suppress
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import Extension, setup

NO_TORCH = ""
try:
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension as BaseBuild
except ImportError as error:
    from setuptools.command.build_ext import build_ext as BaseBuild

    NO_TORCH = f"torch is not importable here ({error}); install it and use --no-build-isolation"

INDEX_BUILDER = "csrc/index_builder.cpp"
FALLBACK = {"megagpt._index_builder": "NumPy code", "megagpt._C": "PyTorch reference code"}
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]


def index_builder() -> Pybind11Extension:
    """The sample maps. No fused multiply-add (a default on ARM): it would choose other samples than NumPy."""
    flags = ["-O3", "-ffp-contract=off"]
    return Pybind11Extension("megagpt._index_builder", [INDEX_BUILDER], cxx_std=17, extra_compile_args=flags)


def op_library():
    """Every op of csrc/ in one library, with CUDA where that can be compiled."""
    headers = sorted(glob("csrc/*.h") + glob("csrc/*.cuh"))
    sources = sorted(set(glob("csrc/*.cpp")) - {INDEX_BUILDER})
    kind, flags = cpp_extension.CppExtension, {"cxx": ["-O3", *OPENMP]}
    cuda_home = cpp_extension.CUDA_HOME  # None for a torch without CUDA
    if glob("csrc/*.cu") and cuda_home and shutil.which("nvcc", path=f"{cuda_home}/bin"):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # else torch would ask the GPUs present
        kind, flags = cpp_extension.CUDAExtension, {**flags, "nvcc": ["-O3"]}
        sources += sorted(glob("csrc/*.cu"))
    return kind("megagpt._C", sources, depends=headers, extra_compile_args=flags, extra_link_args=OPENMP)


def explain(name: str, why: str) -> None:
    """Say what is missing and what runs instead; fail if the extensions are required."""
    message = f"{name} is not built: {why}. {FALLBACK[name]} runs instead."
    if os.environ.get("MEGAGPT_REQUIRE_EXT") == "1":
        sys.exit(f"error: {message} (MEGAGPT_REQUIRE_EXT=1 forbids that)")
    print(f"megagpt: {message}", file=sys.stderr, flush=True)


class Build(BaseBuild):
    """Builds each extension aside, moves it into place whole, and goes on without one that fails."""

    def run(self) -> None:
        if NO_TORCH and Path("csrc/registry.cpp").exists():
            explain("megagpt._C", NO_TORCH)
        compiler = os.environ.get("CXX", "c++").split()[0]
        if shutil.which(compiler) is None:
            for ext in self.extensions:
                self._leave_out(ext, f"no C++ compiler ({compiler}) on the PATH; install g++, or set CXX")
            self.extensions = []
        super().run()

    def build_extension(self, ext) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        build_lib, self.build_lib = self.build_lib, f"{self.build_temp}/staged"
        staged = Path(self.get_ext_fullpath(ext.name))
        try:
            super().build_extension(ext)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, target)
        except Exception as error:  # ninja, distutils and the OS each have a class of their own for this
            target.unlink(missing_ok=True)
            self._leave_out(ext, f"the compiler failed ({str(error).splitlines()[0]}; its output is above)")
        finally:
            self.build_lib = build_lib

    def copy_file(self, infile, outfile, *args, **kwargs):
        """The copy into the source tree, for --inplace: never half a library, never into a mapped one."""
        copied = super().copy_file(infile, f"{outfile}.partial", *args, **kwargs)
        os.replace(f"{outfile}.partial", outfile)
        return (os.fspath(outfile), copied[1])

    def _leave_out(self, ext, why: str) -> None:
        ext.optional = True  # setuptools then misses nothing
        with suppress(FileNotFoundError):  # an older build must not stand in for the sources of today
            Path(self.get_ext_filename(ext.name)).unlink()
        explain(ext.name, why)


extensions: list[Extension] = [index_builder()]
if not NO_TORCH and Path("csrc/registry.cpp").exists():
    extensions.append(op_library())
setup(ext_modules=extensions, cmdclass={"build_ext": Build})
