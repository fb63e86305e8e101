"""The parameters of a model under the names that they have in the whole of it, wherever they live."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from megagpt.parallel.parameter import Part, part_of

TIED = "embedding.tokens.weight"  # which the head of a tied model uses too, perhaps on another pipeline stage


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


def named_parameters(model: nn.Module) -> list[Named]:
    """The parameters of a model without pipeline stages; a tied weight comes once."""
    return [Named(name, parameter, True) for name, parameter in model.named_parameters()]
