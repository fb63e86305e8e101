"""The `megagpt::` operator library: declares ops, loads the compiled kernels, and says which implementation runs.

An op's schema is defined in its own Python file, not in C++, so that every op exists without a compiler: the compiled
library only adds kernels for a device. Where there is none, the public function runs its plain PyTorch reference.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = torch.library.Library("megagpt", "DEF")
KERNELS: set[tuple[str, str]] = set()  # (op, device) of what is compiled; filled while ops are declared
FUNCTIONS: dict[str, type[torch.autograd.Function]] = {}  # by op; filled likewise
UNUSABLE: dict[str, str] = {}  # device: why its compiled kernels cannot run here

# Element types that kernels are written for.
DTYPES = {
    "cpu": (torch.float64, torch.float32, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
}


def define(schema: str, fake: Callable) -> None:
    """Declare an op, e.g. "softcap(Tensor x, float cap) -> Tensor"; `fake` makes its results without computing."""
    LIBRARY.define(schema)
    op = schema.partition("(")[0]
    torch.library.register_fake(f"megagpt::{op}", fake, lib=LIBRARY)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    KERNELS.update((op, device) for device in DTYPES if has(f"megagpt::{op}", device.upper()))


def differentiable(op: str, save: Callable, backward: Callable) -> None:
    """Give an op its gradient: save(ctx, inputs, output), backward(ctx, *grads) -> a gradient or None per input."""
    torch.library.register_autograd(f"megagpt::{op}", backward, setup_context=save, lib=LIBRARY)
    kernel = getattr(torch.ops.megagpt, op).default

    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            output = kernel(*arguments)
        save(ctx, arguments, output)
        return output

    methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    FUNCTIONS[op] = type(op, (torch.autograd.Function,), methods)


def call(op: str, *arguments):
    """Run the kernel of an op that is `differentiable`.

    The same as torch.ops.megagpt.op(...), whose gradient torch finds by a longer way: 20 µs a call, which counts where
    tensors are small.
    """
    if torch.compiler.is_compiling():
        return getattr(torch.ops.megagpt, op)(*arguments)
    if not torch.is_grad_enabled():
        with torch._C._AutoDispatchBelowAutograd():  # which would find out in Python that there is nothing to do
            return getattr(torch.ops.megagpt, op).default(*arguments)
    return FUNCTIONS[op].apply(*arguments)


def has_kernel(op: str, device: str) -> bool:
    """Whether the compiled library holds a kernel of `op` for "cpu" or "cuda", and it runs here."""
    return (op, device) in KERNELS and device not in UNUSABLE


def runs_kernel(op: str, x: Tensor, choice: str = "auto") -> bool:
    """Whether `op` on x runs its kernel (True) or its reference (False).

    choice: "auto" takes the kernel where there is one, "reference" never does, "cpu" and "cuda" insist on it.
    Raises RuntimeError where it insists and there is none.
    """
    if choice == "reference":
        return False
    device = x.device.type
    if x.dtype in KERNEL_DTYPES.get(device, ()) and has_kernel(op, device):
        if choice in ("auto", device):
            return True
        raise RuntimeError(f"kernels={choice} for {op}, but its input is on the {device}; use {device} or auto")
    if choice == "auto":
        return False
    why = MISSING_KERNELS or UNUSABLE.get(device) or f"no kernel for {x.dtype} on {device}"
    raise RuntimeError(f"kernels={choice} for {op}, which has none: {why}; or use kernels=auto")


def require_same_device(op: str, x: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError where a tensor is not on x's device: a kernel would read its address as one of its own."""
    for name, other in others.items():
        if other is not None and other.device != x.device:
            raise ValueError(f"{op}: got {name} on {other.device}, wanted {x.device}, where the first tensor is")


def kernel_status(op: str, device: str, choice: str = "auto") -> tuple[str, str]:
    """Which implementation `op` runs on `device`, and why: for the start-up table."""
    if choice == "reference":
        return "reference", "asked for"
    if has_kernel(op, device):
        return f"{device} kernel", "asked for" if choice == device else "built"
    return "reference", MISSING_KERNELS or UNUSABLE.get(device) or f"this build has no {device} kernel of it"


def declare(ops: Iterable[str]) -> None:
    """Import these ops' files: which kernels there are is known once an op has declared itself."""
    for op in ops:
        importlib.import_module(f"megagpt.ops.{op}")


def op_names() -> list[str]:
    """The ops that there are: the files of this folder beside this one."""
    files = (file.stem for file in Path(__file__).parent.glob("[a-z]*.py"))
    return sorted(name for name in files if name != Path(__file__).stem)


def supports(compiled: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether code compiled for, say, sm_80, sm_90 and compute_90 runs on a GPU of this compute capability.

    sm_XY runs on X.Y and what follows within X, compute_XY on X.Y and all that follows; sm_90a on 9.0 alone.
    """
    for name in compiled:
        kind, _, number = name.partition("_")
        digits = number.rstrip("af")
        wanted = (int(digits[:-1]), int(digits[-1]))
        follows = wanted <= capability and (kind == "compute" or wanted[0] == capability[0])
        if capability == wanted or (follows and digits == number):
            return True
    return False


def check_gpus(compiled: Sequence[str], capabilities: Sequence[tuple[int, int]]) -> None:
    """Leave the CUDA kernels out, and say so once, where a GPU would answer "no kernel image is available"."""
    strange = sorted({c for c in capabilities if not supports(compiled, c)})
    if not compiled or not strange:  # a build without CUDA kernels says so by itself
        return
    numbers = ";".join(f"{major}.{minor}" for major, minor in strange)
    UNUSABLE["cuda"] = (
        f"compiled for {', '.join(compiled)}, but a GPU here is {numbers}: run "
        f'`TORCH_CUDA_ARCH_LIST="{numbers}" make build`'
    )
    warnings.warn(f"megagpt's CUDA kernels do not run, PyTorch reference code does: {UNUSABLE['cuda']}", stacklevel=2)


def _check_gpus_here() -> None:
    if torch._C._dispatch_has_kernel_for_dispatch_key("megagpt::cuda_architectures", "CompositeExplicitAutograd"):
        compiled = torch.ops.megagpt.cuda_architectures().split("+")
        n_gpus = torch.cuda.device_count()
        check_gpus([name for name in compiled if name], [torch.cuda.get_device_capability(i) for i in range(n_gpus)])


def _load_kernels() -> str | None:
    """Load csrc's kernels; returns None, or the reason why there are none."""
    if EMULATED_CUDA:
        torch.ops.load_library(EMULATED_CUDA)
        return None
    folder = Path(__file__).parents[1]
    found = [p for s in importlib.machinery.EXTENSION_SUFFIXES if (p := folder / f"_C{s}").exists()]
    if not found:
        return "not built: run `make build` (needs a C++ compiler)"
    try:
        torch.ops.load_library(found[0])
    except OSError as error:
        return f"{found[0].name} does not load with torch {torch.__version__} ({str(error)[:120]}): run `make build`"
    return None


# For tests: a library of the CUDA kernels built for the CPU (tests/ops/test_cuda.py), loaded in place of ours.
EMULATED_CUDA = os.environ.get("MEGAGPT_EMULATED_CUDA")
KERNEL_DTYPES = {"cpu": DTYPES["cuda"]} if EMULATED_CUDA else DTYPES
define("branches_reached() -> str[]", lambda: [])
define("cuda_architectures() -> str", lambda: "")
MISSING_KERNELS = _load_kernels()
# Once CUDA starts, which importing this must not do: a process that has started it cannot fork.
torch.cuda._lazy_call(_check_gpus_here)
