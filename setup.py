"""Builds csrc/; everything else about the package is in pyproject.toml.

    pip install --no-build-isolation -e .        or        python setup.py build_ext --inplace

- `megagpt._index_builder` and `megagpt._normal` need a C++ compiler and pybind11.
- `megagpt._C`, the ops, needs an importable torch too (hence no build isolation). CUDA sources are compiled
  iff a CUDA torch and an nvcc that fits it are there; a GPU is not asked for, so that a login node can build.

What cannot be built is left out, with one line that says why: the package then runs its NumPy and PyTorch
fallbacks. MEGAGPT_REQUIRE_EXT=1 makes code that does not compile a failure. The compilers' output is in
build/build.log; of an error its first lines are shown.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

NO_PYBIND11 = NO_TORCH = ""
try:
    from pybind11.setup_helpers import Pybind11Extension
except ImportError as error:
    NO_PYBIND11 = f"pybind11 is not importable here ({error}); install it and run `make build`"
try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension as BaseBuild
except ImportError as error:
    from setuptools.command.build_ext import build_ext as BaseBuild

    NO_TORCH = f"torch is not importable here ({error}); install it and use --no-build-isolation"

BY_PYBIND11 = {"megagpt._index_builder": "csrc/index_builder.cpp", "megagpt._normal": "csrc/normal.cpp"}
OPS = sorted(set(glob("csrc/*.cpp")) - set(BY_PYBIND11.values()))
LOG = Path("build/build.log")
FALLBACK = {
    "megagpt._index_builder": "NumPy code",
    "megagpt._normal": "slower PyTorch code",
    "megagpt._C": "PyTorch reference code",
}
OPENMP = [] if sys.platform == "darwin" else ["-fopenmp"]
# Only torch's stable ABI of 2.11 is used, so that one build loads into every later torch.
STABLE_ABI = ["-std=c++20", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
# Loops vectorise: no errno, no trapping, multiply and add in one instruction where there is one.
VECTORISE = ["-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
X86 = ["-mprefer-vector-width=512"] if platform.machine() == "x86_64" and sys.platform != "darwin" else []
CXX_FLAGS = [*STABLE_ABI, "-O3", *VECTORISE, *X86, *OPENMP]
NVCC_FLAGS = [*STABLE_ABI, "-O3", "--expt-relaxed-constexpr", "-DUSE_CUDA"]


def by_pybind11() -> list[Extension]:
    """Sample maps and first weights. No fused multiply-add: NumPy and PyTorch, without it, give other numbers."""
    flags = ["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", *X86]
    headers = sorted(glob("csrc/*.h"))
    return [
        Pybind11Extension(name, [source], cxx_std=17, depends=headers, extra_compile_args=flags)
        for name, source in BY_PYBIND11.items()
    ]


def op_library() -> Extension:
    """Every op of csrc/ in one library, with CUDA where that can be compiled."""
    headers = sorted(glob("csrc/*.h") + glob("csrc/*.cuh"))
    sources, cxx = list(OPS), list(CXX_FLAGS)
    kind, flags = cpp_extension.CppExtension, {"cxx": cxx}
    if glob("csrc/*.cu") and torch.version.cuda and not why_no_cuda(torch.version.cuda, cpp_extension.CUDA_HOME):
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")  # else torch would ask the GPUs present
        targets = cpp_extension._get_cuda_arch_flags()  # -gencode=arch=compute_80,code=sm_80 ...
        codes = [target.partition(",code=")[2] for target in targets]
        cxx.append(f"-DMEGAGPT_CUDA_ARCHITECTURES={'+'.join(codes)}")
        kind, flags = cpp_extension.CUDAExtension, {"cxx": cxx, "nvcc": [*NVCC_FLAGS, *targets]}
        sources += sorted(glob("csrc/*.cu"))
    return kind("megagpt._C", sources, depends=headers, extra_compile_args=flags, extra_link_args=OPENMP)


def why_no_cuda(torch_cuda: str, cuda_home: str | None) -> str:
    """What a torch for CUDA `torch_cuda` misses to compile CUDA sources, and how to get it; empty: nothing."""
    wanted = f"the CUDA toolkit {torch_cuda.partition('.')[0]}.x"
    nvcc = shutil.which("nvcc", path=f"{cuda_home}/bin")
    if nvcc is None:
        return f"no nvcc in {cuda_home or 'sight'}; install {wanted} or set CUDA_HOME to it, and run `make build`"
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    release = re.search(r"release (\d+\.\d+)", done.stdout)
    if release is None:
        return f"{nvcc} does not work ({(done.stderr or done.stdout).strip()[:120]}); install {wanted}"
    if release[1].partition(".")[0] != torch_cuda.partition(".")[0]:
        return (
            f"{nvcc} is of CUDA {release[1]}, torch of CUDA {torch_cuda}; "
            f"install {wanted} or set CUDA_HOME to it, and run `make build`"
        )
    return ""


def first_error(log: str) -> str:
    """The first error in compilers' output, with the lines of source that gcc, clang and nvcc show below it."""
    lines = log.replace(f"{os.getcwd()}/", "").splitlines()
    # file:1:2: error: what, file(1): error: what, ld: undefined reference, nvcc fatal : what
    error = re.compile(r": (fatal )?error: |undefined reference|cannot find -l|nvcc fatal")
    at = next((i for i, line in enumerate(lines) if error.search(line)), None)
    if at is None:
        return "\n".join([line for line in lines if line.strip()][-3:])
    below = [line for line in lines[at + 1 : at + 3] if line.startswith(" ")]
    return "\n".join([lines[at], *below])


def explain(names: list[str], why: str) -> None:
    """Say in one line what is missing and what runs instead; fail if the extensions are required."""
    fallback = " and ".join(FALLBACK[name] for name in names)
    message = f"{' and '.join(names)} not built: {why}. Instead runs {fallback}."
    if os.environ.get("MEGAGPT_REQUIRE_EXT") == "1":
        sys.exit(f"error: {message} (MEGAGPT_REQUIRE_EXT=1 forbids that)")
    say(message)


def say(message: str) -> None:
    """One line to the user."""
    print(f"megagpt: {message}", file=sys.stderr, flush=True)


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """What this process and its compilers print goes to a file, for the time being."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


class Build(BaseBuild):
    """Builds each extension aside, moves it into place whole, and goes on without one that fails."""

    def run(self) -> None:
        if NO_PYBIND11:
            explain(list(BY_PYBIND11), NO_PYBIND11)
        if NO_TORCH:
            explain(["megagpt._C"], NO_TORCH)
        elif torch.version.cuda and (why := why_no_cuda(torch.version.cuda, cpp_extension.CUDA_HOME)):
            say(f"CUDA kernels not built: {why}. GPUs run PyTorch reference code.")
        tried = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
        compiler = next(filter(shutil.which, tried), None)
        if compiler is None:
            why = f"no C++ compiler on the PATH ({', '.join(tried)}); install g++ and run `make build`"
            self._leave_out(self.extensions, why)
            self.extensions = []
        else:
            os.environ.setdefault("CXX", compiler)  # one and the same for compiling and for linking
            if not shutil.which("ninja"):
                say("no ninja on the PATH: files are compiled one by one; `pip install ninja` makes it quicker")
        LOG.unlink(missing_ok=True)
        super().run()

    def build_extensions(self) -> None:
        names = self.compiler.object_filenames

        def object_filenames(sources, *args, **kwargs):
            """softcap.cpp -> softcap.o, softcap.cu -> softcap.cu.o: both would be softcap.o."""
            objects = zip(sources, names(sources, *args, **kwargs), strict=True)
            return [f"{o.removesuffix('.o')}.cu.o" if s.endswith(".cu") else o for s, o in objects]

        self.compiler.object_filenames = object_filenames
        try:
            super().build_extensions()
        except Exception as error:  # torch, of a host compiler that this nvcc does not take
            if not any(map(cuda_sources, self.extensions)):
                raise
            for ext in filter(cuda_sources, self.extensions):
                self._leave_cuda_out(ext, str(error).partition("\n")[0])
            super().build_extensions()

    def build_extension(self, ext) -> None:
        try:
            self._build_aside(ext)
        except Exception as error:  # ninja, distutils and the OS each have a class of their own for this
            why = self._show(error)
            if cuda_sources(ext):
                self._leave_cuda_out(ext, why)
                self.build_extension(ext)
            else:
                Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
                self._leave_out([ext], why)

    def _build_aside(self, ext) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        build_lib, self.build_lib = self.build_lib, f"{self.build_temp}/staged"
        staged = Path(self.get_ext_fullpath(ext.name))
        staged.unlink(missing_ok=True)  # half a library of a build that was killed would count as up to date
        self.log_start = LOG.stat().st_size if LOG.exists() else 0
        try:
            with output_to(LOG):
                super().build_extension(ext)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, target)
        finally:
            self.build_lib = build_lib

    def _show(self, error: Exception) -> str:
        """Print the first error of the failed build; returns why it failed, for a line of its own."""
        log = LOG.read_bytes()[self.log_start :].decode(errors="replace") if LOG.exists() else ""
        print(first_error(log) or str(error), file=sys.stderr)
        return f"it does not compile (above: the first error; everything: {LOG})"

    def copy_file(self, infile, outfile, *args, **kwargs):
        """The copy into the source tree, for --inplace: never half a library, never into a mapped one."""
        final = Path(outfile)
        partial = final.with_name(f".{final.name}")
        copied = super().copy_file(infile, partial, *args, **kwargs)
        os.replace(partial, final)
        return (outfile, copied[1])

    def _leave_cuda_out(self, ext: Extension, why: str) -> None:
        message = f"CUDA kernels not built: {why}"
        if os.environ.get("MEGAGPT_REQUIRE_EXT") == "1":
            self._remove(ext)
            sys.exit(f"error: {message} (MEGAGPT_REQUIRE_EXT=1 forbids that)")
        say(f"{message}. GPUs run PyTorch reference code.")
        ext.sources = [source for source in ext.sources if not source.endswith(".cu")]
        ext.libraries = [library for library in ext.libraries if "cuda" not in library]

    def _leave_out(self, left_out: list[Extension], why: str) -> None:
        for ext in left_out:
            ext.optional = True  # setuptools then misses nothing
            self._remove(ext)
        explain([ext.name for ext in left_out], why)

    def _remove(self, ext: Extension) -> None:
        """An older build must not stand in for the sources of today."""
        with suppress(FileNotFoundError):
            Path(self.get_ext_filename(ext.name)).unlink()


def cuda_sources(ext: Extension) -> list[str]:
    """Those of its sources that nvcc compiles."""
    return [source for source in ext.sources if source.endswith(".cu")]


def main() -> None:
    """Hand the extensions to setuptools."""
    extensions: list[Extension] = []
    if not NO_PYBIND11:
        extensions += by_pybind11()
    if not NO_TORCH:
        extensions.append(op_library())
    setup(ext_modules=extensions, cmdclass={"build_ext": Build})


if __name__ == "__main__":
    main()
