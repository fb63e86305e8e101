"""The parameters of a model under the names that they have in the whole of it, wherever they live."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from megagpt.model.gpt import GPT
from megagpt.inventory.parameter import Parameter
from megagpt.optim.rules import statistic_shape
from megagpt.parallel.parameter import Part, declared_of, part_of


@dataclass(frozen=True)
class Named:
    """A parameter under its canonical name. owned: this process's stage is the one that counts and saves it."""

    name: str
    parameter: nn.Parameter
    owned: bool

    @property
    def part(self) -> Part:
        """Its place in the logical tensor."""
        return part_of(self.parameter)

    @property
    def declared(self) -> Parameter:
        """What its layer says of it."""
        return declared_of(self.parameter)

    def place_of(self, key: str) -> Part:
        """Which part this rank has of what is kept under a key: of a moment as of the parameter; statistics are whole."""
        shape = statistic_shape(key, self.part.shape)
        return self.part if shape is None else Part(shape, dim=None, start=0, length=0)


def named_parameters(model: GPT) -> list[Named]:
    """The parameters of a model without pipeline stages; a tied weight comes once."""
    return [Named(name, parameter, True) for name, parameter in model.named_parameters()]
