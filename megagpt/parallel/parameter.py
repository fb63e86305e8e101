"""Parameters that know which part of a logical tensor they are: what initialisation, clipping and checkpoints need.

The logical tensor is what a one-process run would hold. Along its sharded dim it is cut in chunks of
ceil(size / axis.size) (torch.chunk's rule, which DTensor follows too); a rank may pad its own chunk in memory, but the
padding belongs to nobody: it stays zero and never reaches a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from megagpt.errors import UserError
from megagpt.inventory.parameter import Parameter
from megagpt.parallel.axis import Axis
from megagpt.parallel.beginning import Beginning


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


def held(declared: Parameter, axis: Axis) -> Part:
    """The part that a rank of the axis has of a parameter: its chunk, or all of it where that is not cut."""
    dim, shape = declared.dim(axis.size), declared.shape
    if dim is None:
        return Part(shape, dim=None, start=0, length=0)
    chunk = -(-shape[dim] // axis.size)
    start = min(axis.rank * chunk, shape[dim])
    return Part(shape, dim, start, length=min(chunk, shape[dim] - start))


@dataclass(frozen=True)
class Declared:
    """What a module makes its parameters from: those that its layer declares under the module's name.

    name: canonical, of the module.  parameters: by their names within it.  seed: of the run, for the first values.
    empty: parameters are made without memory, for `give_memory`, or for ZeRO 3, which shards them before they get any;
    whoever asked for that gives them values.
    """

    name: str
    parameters: Mapping[str, Parameter] = field(repr=False)
    seed: int = 0
    empty: bool = False

    def at(self, part: str) -> Declared:
        """The same of a module inside of it; with no parameters where there is no such module."""
        inside = {n.removeprefix(f"{part}."): p for n, p in self.parameters.items() if n.startswith(f"{part}.")}
        return replace(self, name=f"{self.name}.{part}", parameters=inside)

    def make(self, name: str, axis: Axis) -> nn.Parameter:
        """This rank's part of a parameter, born as such, with its first values unless `empty`."""
        declared = self.parameters[name]
        shape, part = declared.local_shape(axis.size), held(declared, axis)
        parameter: Any = nn.Parameter(torch.empty(()).expand(shape) if self.empty else torch.empty(shape))
        parameter.part, parameter.declared = part, declared
        parameter.requires_grad_(declared.trained)
        if not (self.empty or parameter.is_meta):
            Beginning(declared.init, part, shape, self.seed, f"{self.name}.{name}").fill(parameter.data.view(-1))
        return parameter

    def make_if_any(self, name: str, axis: Axis) -> nn.Parameter | None:
        """The same; None where no such parameter is declared."""
        return self.make(name, axis) if name in self.parameters else None


def give_memory(parameter: Tensor, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
    """Memory for one that was made `empty`: its values are any, those of its padding zero."""
    parameter.data = torch.empty(parameter.shape, device=device, dtype=dtype)
    part = part_of(parameter)
    if part.dim is not None:
        n_padding = parameter.shape[part.dim] - part.length
        parameter.data.narrow(part.dim, part.length, n_padding).zero_()


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

    def beginning(self, shape: tuple[int, ...], seed: int) -> Beginning:
        """Its first values in a run.  shape: of this rank's part, with padding (ZeRO 3 leaves the parameter none)."""
        return Beginning(self.declared.init, self.part, shape, seed, self.name)

    def _require(self, what: str) -> None:
        if not hasattr(self.parameter, what):
            raise UserError(
                f"{self.name} is a parameter that its layer does not declare, so that how it is cut, begins and is "
                "saved is not known; declare it in megagpt/inventory/layers.py, and make it by Declared.make"
            )


def trained(parameters: Iterable[Named]) -> list[Named]:
    """Those of them that are not frozen."""
    return [named for named in parameters if named.declared.trained]


def named_parameters(model: nn.Module) -> list[Named]:
    """The parameters of a model without pipeline stages; a tied weight comes once."""
    return [Named(name, parameter, True) for name, parameter in model.named_parameters()]
