"""Logical tensors from what the ranks of a model axis hold, and back."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megagpt.inventory.parameter import Init
from megagpt.parallel.beginning import Beginning
from megagpt.parallel.parameter import Part, part_of

Parts = dict[str, tuple[Part, Tensor]]


def drawn(init: Init, shape: tuple[int, ...], name: str, seed: int) -> Tensor:
    """A whole logical tensor as a run begins with it."""
    whole = Part(shape, dim=None, start=0, length=0)
    return Beginning(init, whole, shape, seed, name).elements(0, math.prod(shape)).view(shape)


def filled(module: nn.Module, logical: Mapping[str, Tensor]) -> nn.Module:
    """The module in the dtype of these logical tensors, its parameters this rank's parts of them; all must be named."""
    module = module.to(next(iter(logical.values())).dtype)
    parameters = dict(module.named_parameters())
    assert parameters.keys() == logical.keys()
    with torch.no_grad():
        for name, parameter in parameters.items():
            part_of(parameter).unpadded(parameter).copy_(part_of(parameter).take(logical[name]))
    return module


def gradient_parts(parameters: Iterable[tuple[str, nn.Parameter]]) -> Parts:
    """This rank's part of each gradient, without padding; what it holds beyond that must be zero."""
    parts = {}
    for name, parameter in parameters:
        part, grad = part_of(parameter), parameter.grad
        assert grad is not None, f"{name} has no gradient"
        meant = part.unpadded(grad)
        assert grad.count_nonzero() == meant.count_nonzero(), f"{name}: padding has a gradient"
        parts[name] = (part, meant)
    return parts


def assemble(ranks: Iterable[Mapping[str, tuple[Part, Tensor]]]) -> dict[str, Tensor]:
    """The logical tensors, by name. A replicated one must be bitwise equal on all ranks; shards must fill the rest."""
    whole: dict[str, Tensor] = {}
    n_found: dict[str, int] = {}
    for parts in ranks:
        for name, (part, local) in parts.items():
            if name not in whole:
                whole[name] = torch.full(part.shape, torch.nan, dtype=local.dtype)
                n_found[name] = 0
            elif part.dim is None:
                assert torch.equal(whole[name], local), f"{name} differs between ranks"
                continue
            part.take(whole[name]).copy_(local)
            n_found[name] += local.numel()
    for name, tensor in whole.items():
        assert n_found[name] == tensor.numel(), f"{name}: {n_found[name]} of {tensor.numel()} elements"
    return whole
