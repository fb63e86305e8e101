"""Logical tensors into the parameters of a model, or of one rank's part of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from megagpt.errors import UserError
from megagpt.hf.messages import few, require_shape
from megagpt.parallel.parameter import part_of


def load_logical(
    parameters: Iterable[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor], *, whole_model: bool = True
) -> None:
    """Copy into each parameter its own part of the logical tensor of that name; padding keeps its zeros.

    parameters: canonical names and parameters, as `GPT.named_parameters()`. Dtypes and devices may differ.
    whole_model: False for the parameters of one pipeline stage: tensors that they do not need are then right.
    Raises UserError, before anything is copied, naming what is missing, unexpected, or of another shape.
    """
    wanted = dict(parameters)
    if missing := wanted.keys() - tensors.keys():
        raise UserError(f"no tensor for {few(missing)}; the weights are those of another architecture")
    if whole_model and (unexpected := tensors.keys() - wanted.keys()):
        raise UserError(f"the model has no {few(unexpected)}; the weights are those of another architecture")
    for name, parameter in wanted.items():
        require_shape(name, tensors[name], part_of(parameter).shape)
    with torch.no_grad():
        for name, parameter in wanted.items():
            part = part_of(parameter)
            part.unpadded(parameter).copy_(part.take(tensors[name]))
