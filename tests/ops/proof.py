"""Holds any op to its reference: the checks that tests/ops and `make gpu-check` run over every case.

The reference in float64, on the inputs as they were rounded, says what is right; each check raises AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.ops.case import Arguments, Case, Draw

# |got - wanted| <= TOLERANCE (|wanted| + mean |wanted|). A result is rounded once (half a unit: 2^-25, 2^-12, 2^-9);
# the rest is for sums in float32 (float64 in float64), whose errors grow with the root of their length.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.float16: 2**-10, torch.bfloat16: 2**-8}


def check_values(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Results and gradients equal those of the reference in float64."""
    arguments = case.make(Draw(dtype, device))
    wanted = run(case, to_float64(arguments), "reference")
    got = run(case, arguments, device_choice(device))
    for name in wanted:
        _require_close(f"{case.name}: {name}", got[name], wanted[name], TOLERANCE[dtype] * case.looser)


def check_non_contiguous(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Inputs with gaps between their elements give the very same results."""
    arguments = case.make(Draw(dtype, device))
    wanted = run(case, arguments, device_choice(device))
    got = run(case, {k: spread(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}, device_choice(device))
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=0, equal_nan=True)


def check_threads(case: Case, dtype: torch.dtype) -> None:
    """One thread and three give results equal to the bit, but for sums over rows, which threads share."""
    before = torch.get_num_threads()
    arguments = case.make(Draw(dtype, "cpu"))
    try:
        results = []
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            results.append(run(case, arguments, "cpu"))
    finally:
        torch.set_num_threads(before)
    for name, one in results[0].items():
        _require_close(f"{case.name} by 3 threads: {name}", results[1][name], one.double(), TOLERANCE[dtype])


def check_registration(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """torch.library.opcheck for each call of an op of ours, forward and backward."""
    recorder = Recorder()
    with recorder:
        run(case, case.make(Draw(dtype, device)), device_choice(device))
    assert recorder.calls, f"{case.name}: no kernel ran"
    for op, arguments, keywords in recorder.calls:
        floating = op._schema.name.endswith("_backward") or op._schema.is_mutable
        clones = tuple(_leaf(a, requires_grad=not floating) if isinstance(a, Tensor) else a for a in arguments)
        torch.library.opcheck(op, clones, keywords)


def check_gradient(case: Case) -> None:
    """Gradients equal finite differences, in float64."""
    arguments = case.make(Draw(torch.float64, "cpu"))
    names = [k for k, v in arguments.items() if differentiable(v)]

    def call(*tensors: Tensor):
        given = {**arguments, **dict(zip(names, (t.clone() for t in tensors), strict=True))}
        return case.call(**given, kernels="cpu")

    assert torch.autograd.gradcheck(call, tuple(arguments[k] for k in names))


def check_compiles(case: Case, dtype: torch.dtype, device: str = "cpu", backend: str = "inductor") -> None:
    """torch.compile takes the op into one graph, and changes nothing."""
    arguments = case.make(Draw(dtype, device))
    wanted = run(case, arguments, device_choice(device))
    torch.compiler.reset()
    compiled = torch.compile(case.call, fullgraph=True, backend=backend)
    got = run(case, arguments, device_choice(device), call=compiled)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], equal_nan=True)


def run(case: Case, arguments: Arguments, kernels: str, call: Callable | None = None) -> dict[str, Tensor]:
    """Results, and the gradients of a fixed weighting of them, by name. The arguments stay as they are."""
    leaves = {k: _leaf(v, requires_grad=True) for k, v in arguments.items() if differentiable(v)}
    # Copies, since some ops overwrite what they are given.
    given = {k: leaves[k].clone() if k in leaves else v for k, v in arguments.items()}
    given = {k: _keep_strides(v, arguments[k]) for k, v in given.items()}
    results = (call or case.call)(**given, kernels=kernels)
    results = (results,) if isinstance(results, Tensor) else results
    outputs = [r for r in results if r.requires_grad]
    weights = [_weights(r) for r in outputs]
    named = {f"result {i}": r.detach().clone() for i, r in enumerate(results)}
    if outputs:
        grads = torch.autograd.grad(outputs, list(leaves.values()), weights, allow_unused=True)
        named |= {f"gradient of {k}": g for k, g in zip(leaves, grads, strict=True) if g is not None}
    return named


def differentiable(x: object) -> bool:
    """Whether a case's argument is a tensor that gradients are taken of."""
    return isinstance(x, Tensor) and x.requires_grad


def to_float64(arguments: Arguments) -> Arguments:
    """The same inputs, wide and on the CPU."""

    def wide(x):
        if not isinstance(x, Tensor):
            return x
        y = x.detach().cpu()
        return y.double().requires_grad_(x.requires_grad) if y.is_floating_point() else y

    return {k: wide(v) for k, v in arguments.items()}


def spread(x: Tensor) -> Tensor:
    """The same values with gaps between them: every second element of a longer row, of a permuted layout."""
    if x.dim() == 0:
        return x
    wide = x.detach().new_zeros(*x.shape[:-1], 2 * x.shape[-1])
    wide[..., ::2] = x.detach()
    return wide[..., ::2].requires_grad_(x.requires_grad)


def device_choice(device: str) -> str:
    """kernels=... that insists on the kernel of a device."""
    return torch.device(device).type


class Recorder(TorchDispatchMode):
    """Keeps every call of an op of ours, with its arguments as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Called by torch for every op beneath autograd."""
        if func.namespace == "megagpt":
            copies = tuple(a.detach().clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.append((func, copies, dict(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _require_close(what: str, got: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert got.shape == wanted.shape, f"{what}: got shape {tuple(got.shape)}, wanted {tuple(wanted.shape)}"
    rounded = wanted.to(got.dtype).double()
    got, wanted = got.cpu().double(), wanted.double()
    # Where rounding to the dtype gives an infinity, that is what is right.
    wanted = torch.where(rounded.isinf(), rounded, wanted)
    finite = wanted.isfinite()
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    scale = wanted[finite].abs().mean() if finite.any() else torch.zeros(())
    bound = tolerance * (wanted.abs() + scale)
    wrong = ~(same | (finite & ((got - wanted).abs() <= bound)))
    if wrong.any():
        where = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} elements are wrong; at {where} "
            f"got {got[where].item():.9g}, wanted {wanted[where].item():.9g} within {bound[where].item():.2g}"
        )


def _leaf(x: Tensor, requires_grad: bool) -> Tensor:
    return x.detach().clone(memory_format=torch.preserve_format).requires_grad_(requires_grad and x.is_floating_point())


def _keep_strides(copy: object, original: object) -> object:
    if not isinstance(original, Tensor) or original.is_contiguous() or not differentiable(original):
        return copy
    return _Spread.apply(copy)


class _Spread(torch.autograd.Function):
    """The identity, into a layout with gaps."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return spread(x).detach()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return grads[0]


def _weights(result: Tensor) -> Tensor:
    """A fixed gradient for a result: the same numbers for every dtype and device, but for rounding."""
    numbers = torch.randn(result.shape, generator=torch.Generator().manual_seed(1))
    return numbers.to(torch.bfloat16).to(result.device, result.dtype)
