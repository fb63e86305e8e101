"""What an op brings along to be proven and measured: cases for tests/ops/proof.py, shapes for benchmarks/kernels.py.

One file of tests/ops/cases per op holds a `SPEC`; tests and benchmarks find it by itself.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from megagpt.cli import parse_run_config
from megagpt.config import ModelConfig
from megagpt.errors import divisors
from megagpt.presets import preset_names

Arguments = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """Draws a case's tensors: the same ones for every dtype and device, but for rounding."""

    dtype: torch.dtype
    device: str
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), compare=False)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """A differentiable input, of the case's dtype unless another is given."""
        x = torch.randn(shape, generator=self.generator, dtype=torch.float32) * scale
        return x.to(self.device, dtype or self.dtype).requires_grad_()

    def values(self, values: Sequence | Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """A differentiable input of these very values."""
        x = torch.as_tensor(values, dtype=torch.float64)
        return x.to(self.device, dtype or self.dtype).requires_grad_()

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in [low, high)."""
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def mask(self, *shape: int, p: float = 0.7) -> Tensor:
        """bool, True with probability p."""
        return (torch.rand(shape, generator=self.generator) < p).to(self.device)


@dataclass(frozen=True)
class Case:
    """One call of a public function, kernels=... left to the caller.

    Its floating-point inputs from `Draw` are the differentiable ones. The reference, in float64 on the same rounded
    inputs, says what is right.
    """

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    make: Callable[[Draw], Arguments]
    gradcheck: bool = False
    """Also compare the gradient with finite differences (float64: keep it to some dozens of elements)."""
    nan: bool = False
    """Its results hold NaN: torch's opcheck, to which NaN differs from itself, leaves it out."""
    looser: float = 1.0
    """Widens the tolerance."""
    why_looser: str = ""
    """The reason, which a `looser` above 1 must have."""

    def __post_init__(self) -> None:
        assert self.looser == 1.0 or self.why_looser, f"case {self.name}: looser without why_looser"


@dataclass(frozen=True)
class Shape:
    """One line of the benchmark: forward and backward are timed apart."""

    name: str
    make: Callable[[Draw], Arguments]
    forward_bytes: Callable[[Arguments], int]
    """What the forward pass must read and write at the least."""
    backward_bytes: Callable[[Arguments], int]
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Spec:
    """All about one op. `call` is what the benchmark times."""

    op: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    cases: Sequence[Case]
    shapes: Sequence[Shape]
    widths: Sequence[Case] = ()
    """Of each preset, whole and as tensor parallel ranks have them: proven in values alone."""
    branches: bool = True
    """False for a chain of other ops, which has no source of its own."""
    eager: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    """What one would write in plain torch; default: the reference."""
    peers: Mapping[str, Callable[[], Callable[..., Tensor | tuple[Tensor, ...]]]] = field(default_factory=dict)
    """Other implementations by package: a function that imports it and returns one with the signature of `call`."""


def preset_widths(of: Callable[[ModelConfig, int], T]) -> list[T]:
    """What `of` makes of each preset and each tensor parallel size that it can be cut by, once each and sorted."""
    found: set[T] = set()
    for name in preset_names():
        model = parse_run_config(["--preset", name]).model
        sizes = [tp for tp in divisors(math.gcd(model.n_heads, model.ff_width)) if tp <= 64]
        found |= {of(dataclasses.replace(model, vocab_size=model.vocab_size or 50257), tp) for tp in sizes}
    return sorted(found)  # type: ignore[type-var] # numbers, or tuples of them


def all_specs() -> list[Spec]:
    """The SPEC of every file in tests/ops/cases, by name."""
    # Each of these files imports this one.
    package = importlib.import_module("tests.ops.cases")
    names = sorted(module.name for module in pkgutil.iter_modules(package.__path__))
    return [importlib.import_module(f"tests.ops.cases.{name}").SPEC for name in names]
