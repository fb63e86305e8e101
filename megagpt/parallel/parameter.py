"""Parameters that know which part of a logical tensor they are: what initialisation, clipping and checkpoints need.

The logical tensor is what a one-process run would hold. Along its sharded dim it is cut in chunks of
ceil(size / axis.size) (torch.chunk's rule, which DTensor follows too); a rank may pad its own chunk in memory, but the
padding belongs to nobody: it stays zero and never reaches a checkpoint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from megagpt.errors import UserError
from megagpt.inventory.parameter import Init, Parameter
from megagpt.parallel.axis import Axis


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


def declared_of(parameter: Tensor) -> Parameter:
    """What the layer that made a parameter says of it."""
    return parameter.declared  # type: ignore[attr-defined]


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
class Declared:
    """What a module makes its parameters from: those that its layer declares under the module's name.

    name: canonical, of the module.  parameters: by their names within it.  seed: of the run, for the first values.
    """

    name: str
    parameters: Mapping[str, Parameter] = field(repr=False)
    seed: int = 0

    def at(self, part: str) -> Declared:
        """The same of a module inside of it; with no parameters where there is no such module."""
        inside = {n.removeprefix(f"{part}."): p for n, p in self.parameters.items() if n.startswith(f"{part}.")}
        return Declared(f"{self.name}.{part}", inside, self.seed)

    def make(self, name: str, axis: Axis) -> nn.Parameter:
        """This rank's part of a parameter, drawn whole by (seed, canonical name): the layout plays no part."""
        declared = self.parameters[name]
        full, dim = drawn(declared.init, declared.shape, f"{self.name}.{name}", self.seed), declared.dim(axis.size)
        parameter = replicated(full) if dim is None else sharded(full, dim, axis, declared.pad_to)
        parameter.declared = declared  # type: ignore[attr-defined]
        return parameter

    def make_if_any(self, name: str, axis: Axis) -> nn.Parameter | None:
        """The same; None where no such parameter is declared."""
        return self.make(name, axis) if name in self.parameters else None


def drawn(init: Init, shape: tuple[int, ...], name: str, seed: int) -> Tensor:
    """A logical tensor at the start of a run; uninitialised on the meta device."""
    if init.kind == "zeros":
        return torch.zeros(shape)
    if init.kind == "ones":
        return torch.ones(shape)
    if init.kind == "normal":
        return _normal(init.scale, shape, name, seed)
    pairs = _normal(1.0, shape[:-1], name, seed)
    cos, sin = (pairs / pairs.norm(dim=-1, keepdim=True)).unbind(-1)
    return torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2) * init.scale


def _normal(std: float, shape: tuple[int, ...], name: str, seed: int) -> Tensor:
    if torch.get_default_device().type == "meta":
        return torch.empty(shape)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(shape, dtype=torch.float32, device="cpu").normal_(0.0, std, generator=generator)


@dataclass(frozen=True)
class Named:
    """A parameter under its canonical name, the one that it has in the whole model, wherever it lives.

    owned: this process's stage is the one that counts and saves it.
    `part` and `declared` raise UserError for a parameter of somebody's own that no layer declares.
    """

    name: str
    parameter: nn.Parameter
    owned: bool

    @property
    def part(self) -> Part:
        """Its place in the logical tensor."""
        self._require("part")
        return part_of(self.parameter)

    @property
    def declared(self) -> Parameter:
        """What its layer says of it."""
        self._require("declared")
        return declared_of(self.parameter)

    def _require(self, what: str) -> None:
        if not hasattr(self.parameter, what):
            raise UserError(
                f"{self.name} is a parameter that its layer does not declare, so that how it is cut, begins and is "
                "saved is not known; declare it in megagpt/inventory/layers.py, and make it by Declared.make"
            )


def named_parameters(model: nn.Module) -> list[Named]:
    """The parameters of a model without pipeline stages; a tied weight comes once."""
    return [Named(name, parameter, True) for name, parameter in model.named_parameters()]
