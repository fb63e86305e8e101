"""Parameters that know which part of a logical tensor they are: what initialisation, clipping and checkpoints need.

The logical tensor is what a one-process run would hold. Along its sharded dim it is cut in chunks of
ceil(size / axis.size) (torch.chunk's rule, which DTensor follows too); a rank may pad its own chunk in memory, but the
padding belongs to nobody: it stays zero and never reaches a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megagpt.parallel.axis import Axis

# (name within the layer, logical shape) -> the full tensor
Draw = Callable[[str, tuple[int, ...]], Tensor]


@dataclass(frozen=True)
class Part:
    """Where a local parameter lies in its logical tensor. dim is None where every rank holds all of it."""

    shape: tuple[int, ...]
    dim: int | None
    start: int
    length: int

    def take(self, full: Tensor) -> Tensor:
        """This rank's slice of the logical tensor, without padding."""
        return full if self.dim is None else full.narrow(self.dim, self.start, self.length)

    def unpadded(self, local: Tensor) -> Tensor:
        """The meaningful part of a local tensor (parameter, gradient or moment)."""
        return local if self.dim is None else local.narrow(self.dim, 0, self.length)


def part_of(parameter: Tensor) -> Part:
    """The part that a megagpt parameter is; anything else is a bug in the layer that made it."""
    return parameter.part  # type: ignore[attr-defined]


def replicated(full: Tensor) -> nn.Parameter:
    """A parameter that every rank of the model axis holds whole, with equal gradients."""
    return _tagged(full, Part(shape=tuple(full.shape), dim=None, start=0, length=0))


def sharded(full: Tensor, dim: int, axis: Axis, pad_to: int = 1) -> nn.Parameter:
    """This rank's chunk of `full` along dim, padded with zeros to a multiple of `pad_to`."""
    size = full.shape[dim]
    chunk = -(-size // axis.size)
    start = min(axis.rank * chunk, size)
    part = Part(shape=tuple(full.shape), dim=dim, start=start, length=min(chunk, size - start))
    local_shape = list(full.shape)
    local_shape[dim] = -(-chunk // pad_to) * pad_to
    local = full.new_zeros(local_shape)
    part.unpadded(local).copy_(part.take(full))
    return _tagged(local, part)


def _tagged(local: Tensor, part: Part) -> nn.Parameter:
    parameter = nn.Parameter(local)
    parameter.part = part  # type: ignore[attr-defined]
    return parameter


@dataclass(frozen=True)
class NamedNormal:
    """Draws weights from N(0, std²) by (seed, canonical name), biases as zeros, gains as ones: layout plays no part.

    std None: 1 / √inputs, the last dim of a matrix.
    """

    seed: int
    name: str
    std: float | None = 0.02

    def __call__(self, name: str, shape: tuple[int, ...]) -> Tensor:
        if name == "bias":
            return torch.zeros(shape)
        if name == "gain":
            return torch.ones(shape)
        if torch.get_default_device().type == "meta":
            return torch.empty(shape)
        digest = hashlib.sha256(f"{self.seed}/{self.name}.{name}".encode()).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        std = shape[-1] ** -0.5 if self.std is None else self.std
        return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


DEFAULT_DRAW = NamedNormal(seed=0, name="layer")
