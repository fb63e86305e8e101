"""What a layer declares of each number that it learns; modules, the plan, converters and optimizers read it. No torch.

Letters: I inputs, O outputs, F hidden width, tp tensor parallel size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Shape = tuple[int, ...]

# Keys of what a run keeps of a parameter, beside what its optimizer names.
WEIGHT = "weight"
AVERAGE = "ema"  # exponential moving average of the weights


@dataclass(frozen=True)
class Init:
    """How a parameter begins: an element is a function of (seed, canonical name, its place in the logical tensor).

    normal: N(0, scale²).  zeros, ones.  rotations: 2x2 matrices in the last dims that turn pairs by angles of their
    own, times scale.
    """

    kind: Literal["normal", "zeros", "ones", "rotations"]
    scale: float = 1.0


ZEROS, ONES = Init("zeros"), Init("ones")


@dataclass(frozen=True)
class Parameter:
    """One logical tensor: what a run of one process holds whole.

    kind: "map" multiplies activations: (O, I) or, for several, their number in front; "vector" is a bias or a gain;
    "table" is any other: rows that are looked up, the output matrix, coefficients of what a map is made from.
    init: how it is drawn.
    sharded: the dim that is cut over the model axis; None where every rank holds all of it.
    heads: the heads that the sharded dim goes by. A head is not cut: with more ranks than heads every rank holds all.
    maps_per_head: linear maps whose rows lie side by side within each head's ([q, k, v]: 3).
    pad_to: a rank pads its share of the sharded dim to a multiple of this.
    flops: of one token, forward, where they are not 2 for each element of a map and 0 for others.
    trained: whether it has a gradient, and whatever an optimizer keeps.
    """

    shape: Shape
    kind: Literal["map", "table", "vector"]
    init: Init
    sharded: int | None = None
    heads: int | None = None
    maps_per_head: int = 1
    pad_to: int = 1
    flops: int | None = None
    trained: bool = True

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def decays(self) -> bool:
        """Whether weight decay applies: to matrices, not to biases and gains."""
        return self.kind != "vector"

    @property
    def flops_per_token(self) -> int:
        """FLOPs of a token through it, forward."""
        if self.flops is not None:
            return self.flops
        return 2 * self.size if self.kind == "map" else 0

    def dim(self, tp: int) -> int | None:
        """The dim that tp ranks cut; None where each holds all."""
        return None if self.heads is not None and self.heads < tp else self.sharded

    def local_shape(self, tp: int) -> Shape:
        """Of what one of tp ranks holds, padding included."""
        dim = self.dim(tp)
        if dim is None:
            return self.shape
        rows = -(-self.shape[dim] // tp)
        return (*self.shape[:dim], -(-rows // self.pad_to) * self.pad_to, *self.shape[dim + 1 :])

    def local_size(self, tp: int) -> int:
        """Elements of that."""
        return math.prod(self.local_shape(tp))


Parameters = Mapping[str, Parameter]
"""By name within a layer or a module: "attention.qkv.weight"."""


def under(name: str, parameters: Parameters) -> dict[str, Parameter]:
    """The same parameters as those of a part: "weight" → "name.weight"."""
    return {f"{name}.{leaf}": parameter for leaf, parameter in parameters.items()}


def column(
    n_inputs: int,
    n_outputs: int,
    std: float = 0.02,
    *,
    bias: bool = True,
    packs: int = 1,
    heads: int | None = None,
    maps_per_head: int = 1,
) -> dict[str, Parameter]:
    """A linear map whose outputs are cut over the model axis: weight (O, I), bias (O).

    packs: so many maps, each cut alike: weight (packs, O, I), bias (packs, O).
    """
    packed = () if packs == 1 else (packs,)
    cut = {"sharded": len(packed), "heads": heads, "maps_per_head": maps_per_head}
    weight = Parameter((*packed, n_outputs, n_inputs), "map", Init("normal", std), **cut)
    return {"weight": weight} | ({"bias": Parameter((*packed, n_outputs), "vector", ZEROS, **cut)} if bias else {})


def row(n_inputs: int, n_outputs: int, std: float = 0.02, *, bias: bool = True) -> dict[str, Parameter]:
    """A linear map whose inputs are cut over the model axis: weight (O, I); bias (O), whole on every rank."""
    weight = Parameter((n_outputs, n_inputs), "map", Init("normal", std), sharded=1)
    return {"weight": weight} | ({"bias": Parameter((n_outputs,), "vector", ZEROS)} if bias else {})


@dataclass(frozen=True)
class Kept:
    """Numbers of a token that the backward pass needs, kept from the forward pass.

    ways: into how many shares the model axis can cut them; 1: every rank keeps all, None: any number.
    once: they are kept once a micro-batch, for all its sequences together.
    """

    what: str
    numbers: int
    ways: int | None = None
    once: bool = False

    def local(self, tp: int, micro_batch_size: int) -> int:
        """Of one of tp ranks."""
        shares = tp if self.ways is None else min(tp, self.ways)
        return self.numbers // shares // (micro_batch_size if self.once else 1)


def kept_numbers(kept: Iterable[Kept], tp: int, micro_batch_size: int) -> int:
    """The sum for a token on one of tp ranks."""
    return sum(k.local(tp, micro_batch_size) for k in kept)
