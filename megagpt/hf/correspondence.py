"""The table of an architecture, written out tensor by tensor for what the layers of one configuration declare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megagpt.hf.architecture import Architecture
from megagpt.hf.layouts import ours_of, parts_of_ours
from megagpt.inventory.layers import canonical
from megagpt.inventory.parameter import Parameter, Shape

if TYPE_CHECKING:
    from megagpt.config import ModelConfig

Modules = dict[str, dict[str, Parameter]]
"""What our layers declare, by the names of module and leaf."""
Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]

_QKV = "qkv"  # what tables call queries, keys and values, be they one matrix or two


@dataclass(frozen=True)
class Correspondence:
    """Logical tensors of ours (name → shape), those of theirs with the same contents, and the way between.

    The two changes are exact inverses. A tensor that needs none is passed on, not copied.
    """

    ours: dict[str, Shape]
    theirs: tuple[str, ...]
    to_ours: Change
    to_theirs: Change

    def their_shapes(self) -> list[Shape]:
        """Of each of theirs."""
        ours = [torch.empty(shape, device="meta") for shape in self.ours.values()]
        return [tuple(tensor.shape) for tensor in self.to_theirs(ours)]


def correspondences(table: Architecture, config: ModelConfig) -> Iterator[Correspondence]:
    """All tensors of the model, block by block within a module.

    A module of the table that no layer of this configuration declares is passed over: a tied output matrix, say.
    """
    modules = _modules(config)
    for module, theirs in table.modules(config).items():
        names = (theirs,) if isinstance(theirs, str) else theirs
        for i in range(config.n_layers if "{}" in module else 1):
            held = _held(module.format(i), modules)
            for leaf in next(iter(held.values()), {}):
                ours = {_joined(part, leaf): leaves[leaf] for part, leaves in held.items()}
                yield _correspondence(table, config, ours, tuple(_joined(name.format(i), leaf) for name in names))


def _modules(config: ModelConfig) -> Modules:
    """Each parameter is there twice: as a leaf of its module, and as a module itself, whose leaf has no name."""
    modules: Modules = {}
    for name, declared in canonical(config).items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = declared
        modules[name] = {"": declared}
    return modules


def _held(module: str, modules: Modules) -> Modules:
    """What our model has of a module of the table: itself, nothing, or queries apart from shared keys and values."""
    stem = module.removesuffix(_QKV)
    apart = stem != module and module not in modules
    names = (f"{stem}q", f"{stem}kv") if apart else (module,)
    return {name: modules[name] for name in names if name in modules}


def _correspondence(
    table: Architecture, config: ModelConfig, ours: Mapping[str, Parameter], theirs: tuple[str, ...]
) -> Correspondence:
    """That of one leaf of a module: of its weights, or of its biases."""
    declared, shapes = list(ours.values()), {name: parameter.shape for name, parameter in ours.items()}
    turn = _turn if table.transposed and declared[0].kind == "map" else _same
    if declared[0].heads is not None:  # rows that go by head: q, k, v

        def to_ours(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            return ours_of(table.qkv.take(turn(tensors), config), declared)

        def to_theirs(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            return turn(table.qkv.give(parts_of_ours(tensors, declared)))

        return Correspondence(shapes, theirs, to_ours, to_theirs)
    if len(theirs) > 1:
        return Correspondence(shapes, theirs, _stack, _unstack)
    return Correspondence(shapes, theirs, turn, turn)


def _joined(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if leaf else module


def _same(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


def _turn(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensor.t().contiguous() for tensor in tensors]


def _stack(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.stack(tuple(tensors))]


def _unstack(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [part.contiguous() for part in tensors[0].unbind()]
