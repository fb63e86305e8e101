"""LayerNorm and RMSNorm, alone or of a residual sum: what proves and measures them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megagpt.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from tests.ops.case import Arguments, Case, Draw, Shape, Spec, preset_widths

Result = Tensor | tuple[Tensor, Tensor]


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    center: bool = True,
    kernels: str = "auto",
) -> Result:
    """The one of the four that fits the arguments."""
    if residual is None and center:
        return layer_norm(x, weight, bias, eps, kernels=kernels)
    if residual is None:
        return rms_norm(x, weight, eps, kernels=kernels)
    if center:
        return add_layer_norm(x, residual, weight, bias, eps, kernels=kernels)
    return add_rms_norm(x, residual, weight, eps, kernels=kernels)


def unfused(layer: Callable[..., Tensor], rms: Callable[..., Tensor]) -> Callable[..., Result]:
    """The same of a layer(x, weight, bias, eps) and an rms(x, weight, eps), the addition in plain torch."""

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        eps: float = 1e-5,
        center: bool = True,
    ) -> Result:
        total = x if residual is None else x + residual
        y = layer(total, weight, bias, eps) if center else rms(total, weight, eps)
        return y if residual is None else (y, total)

    return call


def eager() -> Callable[..., Result]:
    """What one would write in plain torch."""
    return unfused(
        lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps),
        lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps),
    )


def apex() -> Callable[..., Result]:
    # A peer, which is not a requirement.
    from apex.normalization.fused_layer_norm import (  # pyright: ignore[reportMissingImports]
        fused_layer_norm_affine,
        fused_rms_norm_affine,
    )

    return unfused(
        lambda x, weight, bias, eps: fused_layer_norm_affine(x, weight, bias, weight.shape, eps),
        lambda x, weight, eps: fused_rms_norm_affine(x, weight, weight.shape, eps),
    )


def liger() -> Callable[..., Result]:
    # A peer, which is not a requirement.
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # pyright: ignore[reportMissingImports]

    # The same.
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction  # pyright: ignore[reportMissingImports]

    return unfused(
        LigerLayerNormFunction.apply,
        lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False),
    )


def quack() -> Callable[..., Result]:
    """Its RMSNorm adds the residual itself; its LayerNorm has no gradient, and is left out."""
    # A peer, which is not a requirement.
    from quack.rmsnorm import rmsnorm  # pyright: ignore[reportMissingImports]

    def call(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
        eps: float = 1e-5,
        center: bool = True,
    ) -> Result:
        if center:
            raise NotImplementedError("no LayerNorm with a gradient")
        return rmsnorm(x, weight, residual=residual, eps=eps, prenorm=residual is not None)

    return call


def sized(
    *shape: int, add: bool = False, biased: bool = True, center: bool = True, eps: float = 1e-5, step: float = 1 / 16
) -> Callable[[Draw], Arguments]:
    """x of a shape, off zero, so that the mean matters; multiples of `step`, so that bfloat16 holds sums exactly."""

    def make(draw: Draw) -> Arguments:
        def rows(scale: float, shift: float) -> Tensor:
            x = draw.normal(*shape, dtype=torch.float64).detach() * scale + shift
            return draw.values((x / step).round().mul(step).clamp(-8 + step, 8 - step))

        arguments: Arguments = {"x": rows(2.0, 0.5), "weight": draw.normal(*shape[-1:]), "eps": eps, "center": center}
        if biased and center:
            arguments["bias"] = draw.normal(*shape[-1:])
        if add:
            arguments["residual"] = rows(1.0, 0.0)
        return arguments

    return make


def one_column(draw: Draw) -> Arguments:
    """Its normal is zero, and so are the gradients of x and of the weight: few bits, so that none is lost."""
    return {"x": draw.values([[0.5], [-2.0]]), "weight": draw.values([0.75]), "bias": draw.normal(1)}


def extreme(center: bool) -> Callable[[Draw], Arguments]:
    """Rows with inf and NaN, which must not touch others; constant rows; values whose squares just fit float32."""
    rows = [[1.0, -2.0, 3.0, 0.0]] * 2 + [[0.0] * 4, [2.0] * 4, [1e15, -1e15, 1e14, 0.0], [1e-15, 0.0, 1e-16, 0.0]]
    rows += [[math.inf, 1.0, 2.0, 3.0], [-math.inf, math.inf, 0.0, 1.0], [math.nan, 1.0, 2.0, 3.0]]

    def make(draw: Draw) -> Arguments:
        x = draw.values(torch.tensor(rows, dtype=torch.float64).repeat(1, 4))
        arguments: Arguments = {"x": x, "weight": draw.normal(16), "center": center}
        return arguments | {"bias": draw.normal(16)} if center else arguments

    return make


CASES = (
    Case("one element", norm, sized(1, center=False, eps=1.0)),
    Case("one column", norm, one_column),
    Case("empty", norm, sized(3, 0), nan=True),  # the statistics are 0 / 0
    Case("no rows", norm, sized(0, 8, add=True)),
    Case("odd, three dimensions", norm, sized(3, 5, 7, add=True)),
    Case("one row of one dimension", norm, sized(40, biased=False)),
    Case("many rows", norm, sized(331, 24, add=True)),
    Case("RMS, many rows", norm, sized(257, 64, center=False)),
    Case("GPT-2 small", norm, sized(5, 768)),
    Case("a rounded sum", norm, sized(9, 96, add=True, step=2**-20), looser=3, why_looser="the sum is rounded, then y"),
    Case("a warp a row at the most in 16 bits", norm, sized(5, 1024, add=True)),
    Case("one pack more", norm, sized(3, 1032, add=True)),
    Case("a warp a row at the most in float32", norm, sized(5, 512, center=False)),
    Case("one pack more than that", norm, sized(3, 516, add=True, center=False)),
    Case("more rows than blocks hold", norm, sized(70, 520, add=True)),
    Case("odd columns", norm, sized(2, 1021, biased=False)),
    Case("registers backward at the most in float32", norm, sized(2, 8192, add=True)),
    Case("one pack more than those", norm, sized(2, 8200, center=False)),
    Case("registers backward at the most in 16 bits", norm, sized(1, 16384, add=True, center=False)),
    Case("longer than registers", norm, sized(1, 32776, add=True)),
    Case("64K columns", norm, sized(1, 65536)),
    Case("extreme values", norm, extreme(center=True), nan=True),
    Case("extreme values of RMS", norm, extreme(center=False), nan=True),
    Case("small RMS", norm, sized(3, 5, add=True, center=False), gradcheck=True),
    Case("small", norm, sized(2, 3, 5, add=True), gradcheck=True),
)


WIDTHS = tuple(
    Case(f"{'LayerNorm' if center else 'RMSNorm'} of {width}", norm, sized(2, width, add=True, center=center))
    for center in (True, False)
    for width in preset_widths(lambda model, _: model.d_model)
)


def forward_bytes(arguments: Arguments) -> int:
    """Read x (and the residual), write y (and the sum)."""
    x = arguments["x"]
    return (4 if "residual" in arguments else 2) * x.numel() * x.element_size()


def backward_bytes(arguments: Arguments) -> int:
    """Read the gradient (and that of the sum) and what was normalised, write dx."""
    x = arguments["x"]
    return (4 if "residual" in arguments else 3) * x.numel() * x.element_size()


def shapes(rows: int, columns: int, device: str) -> tuple[Shape, ...]:
    """The benchmark's lines of one size."""
    size = f"{rows} x {columns}"
    makes = {
        f"LayerNorm, {size}": sized(rows, columns),
        f"add + LayerNorm, {size}": sized(rows, columns, add=True),
        f"RMSNorm, {size}": sized(rows, columns, center=False),
        f"add + RMSNorm, {size}": sized(rows, columns, add=True, center=False),
    }
    return tuple(Shape(name, make, forward_bytes, backward_bytes, (device,)) for name, make in makes.items())


SPEC = Spec(
    op="norm",
    call=norm,
    cases=CASES,
    widths=WIDTHS,
    shapes=(
        *shapes(4096, 768, "cpu"),
        *shapes(1024, 4096, "cpu"),
        *shapes(16384, 1024, "cuda"),
        *shapes(16384, 2048, "cuda"),
        *shapes(16384, 4096, "cuda"),
        *shapes(8192, 8192, "cuda"),
        *shapes(4096, 16384, "cuda"),
    ),
    eager=eager(),
    peers={"apex": apex, "liger": liger, "quack": quack},
)
