"""All the weights of a small model at once: to and from transformers' names, and into our parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megagpt.config import ModelConfig
from megagpt.hf import lazy_from_hf, lazy_to_hf
from megagpt.parallel.parameter import part_of


def from_hf(state: Mapping[str, Tensor], config: ModelConfig, architecture: str | None = None) -> dict[str, Tensor]:
    """Our logical tensors."""
    lazy = lazy_from_hf(state, state.__getitem__, config, architecture)
    return {name: tensor.get() for name, tensor in lazy.items()}


def to_hf(tensors: Mapping[str, Tensor], config: ModelConfig, architecture: str | None = None) -> dict[str, Tensor]:
    """Theirs, as transformers' files have them."""
    lazy = lazy_to_hf(tensors.__getitem__, config, architecture)
    return {name: tensor.get() for name, tensor in lazy.items()}


@torch.no_grad()
def load_logical(parameters: Iterable[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor]) -> None:
    """Copy into each parameter, by canonical name, its own part of the logical tensor; padding keeps its zeros."""
    for name, parameter in parameters:
        part = part_of(parameter)
        assert tuple(tensors[name].shape) == part.shape, name
        part.unpadded(parameter).copy_(part.take(tensors[name]))
