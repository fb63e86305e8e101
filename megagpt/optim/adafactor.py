"""Adafactor, with factored second moments or (PaLM) whole ones, over logical tensors that ranks share.

The step of a tensor is in proportion to the root mean square of its weights, and no longer than that times the rate:
both are sums over the logical tensor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from megagpt.optim.update import EXP_AVG, EXP_AVG_SQ, Update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from megagpt.config import RunConfig
    from megagpt.inventory.parameter import Parameter
    from megagpt.optim.mesh_optimizer import MeshOptimizer
    from megagpt.optim.segments import Segment, Segments
    from megagpt.parallel.parameter import Part

Statistics = dict[str, dict[str, "Tensor"]]
"""key -> name of the parameter -> its means over rows or columns."""

ROWS, COLUMNS = "exp_avg_sq_rows", "exp_avg_sq_columns"  # a number a row, a number a column
LEAST_MEAN = 2.0**-126  # fp32's smallest normal number
LEAST_SCALE = 1e-3  # of weights that are nearly zero: the paper's epsilon 2


class Unfactored(Update):
    """With whole second moments, and first ones (PaLM)."""

    name = "adafactor"
    moments = (EXP_AVG, EXP_AVG_SQ)

    def settings(self, run: RunConfig) -> dict[str, Any]:
        return {"beta2_power": run.optim.beta2_power}

    def step(self, optimizer: MeshOptimizer, masters: list[Tensor], group: dict[str, Any]) -> None:
        parts = optimizer.segments_of(masters)
        adafactor(optimizer.segments, parts, optimizer.state, optimizer.statistics, group)


class OfVectors(Unfactored):
    """A second moment of what is no matrix."""

    moments = (EXP_AVG_SQ,)


class Adafactor(Unfactored):
    """Means over rows and columns in place of a matrix's second moment; leading dims number matrices."""

    moments = ()
    statistics = {ROWS: lambda shape: shape[:-1], COLUMNS: lambda shape: (*shape[:-2], shape[-1])}  # noqa: RUF012

    def of(self, parameter: Parameter) -> Update:
        return self if parameter.decays else OF_VECTORS


OF_VECTORS = OfVectors()


def adafactor(
    segments: Segments, parts: list[Segment], state: Any, statistics: Statistics, group: dict[str, Any]
) -> None:
    """One step of the parameters that `parts` are segments of. Overwrites their gradients.

    The rate is the schedule's, where the paper's own is min(1e-2, 1/sqrt(step)); `eps` is the least root of a second
    moment that is divided by. First moments, where the state has them, average the finished steps.
    Comm: two rounds of all-reduces of a few numbers a row and column.
    Source: Shazeer & Stern 2018, algorithms 4 and 5, sections 5 to 7; Chowdhery et al. 2022 (PaLM), section 5.
    """
    if not parts:
        return
    rate = float(state[parts[0].master]["step"]) ** -group["beta2_power"]  # 1 - beta2
    factored = [part for part in parts if EXP_AVG_SQ not in state[part.master]]
    squares = [part.of(part.master).square().sum() for part in parts]
    means = [m for part in factored for m in _row_and_column_means(part)]
    twice = [part for part in factored for _ in range(2)]
    totals = segments.totals([*parts, *twice], [*squares, *means])
    for number, part in enumerate(factored):
        rows, columns = totals[len(parts) + 2 * number :][:2]
        for key, mean in ((ROWS, rows), (COLUMNS, columns)):
            statistics[key][part.named.name].lerp_(mean, rate)
    for part in parts:
        _divide_gradient(part, state, statistics, group["eps"], rate)
    sizes = [math.prod(part.named.part.shape) for part in parts]
    lengths = segments.totals(parts, [_gradient(part).square().sum() for part in parts])
    for part, square, length, n in zip(parts, totals[: len(parts)], lengths, sizes, strict=True):
        scale = (square / n).sqrt().clamp_(min=LEAST_SCALE)
        _move(part, state, scale / (length / n).sqrt().clamp_(min=1.0), group)


def _row_and_column_means(part: Segment) -> tuple[Tensor, Tensor]:
    """What this rank adds to the mean squared gradient of each row and column of the logical tensor."""
    squares = part.alone(part.gradients).square_()
    n_rows, n_columns = part.named.part.shape[-2:]
    of_rows, of_columns = squares.sum(-1) / n_columns, squares.sum(-2) / n_rows
    last = squares.dim() - 1
    return _placed(part.named.part, of_rows, last), _placed(part.named.part, of_columns, last - 1)


def _divide_gradient(part: Segment, state: Any, statistics: Statistics, eps: float, rate: float) -> None:
    """The gradient becomes the unscaled step: divided by the root of the second moment, whose average goes on."""
    gradient, kept = _gradient(part), state[part.master]
    if EXP_AVG_SQ in kept:
        second_moment = part.of(kept[EXP_AVG_SQ])
        second_moment.lerp_(gradient.square(), rate)
        gradient.div_(second_moment.sqrt().clamp_(min=eps))
    elif part.length:
        rows, columns = (statistics[key][part.named.name] for key in (ROWS, COLUMNS))
        means = rows.mean(-1, keepdim=True).clamp_(min=LEAST_MEAN)
        last = len(part.shape) - 1
        rows = _taken(part.named.part, rows / means, last, part.shape)
        columns = _taken(part.named.part, columns, last - 1, part.shape)
        gradient.div_(part.cut(rows.unsqueeze(-1) * columns.unsqueeze(-2)).sqrt_().clamp_(min=eps))


def _move(part: Segment, state: Any, scale: Tensor, group: dict[str, Any]) -> None:
    weight, step = part.of(part.master), _gradient(part).mul_(scale * group["lr"])
    if EXP_AVG in state[part.master]:
        step = part.of(state[part.master][EXP_AVG]).lerp_(step, 1 - group["betas"][0])
    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(step)


def _gradient(part: Segment) -> Tensor:
    return part.of(part.gradients)


def _placed(part: Part, local: Tensor, gone: int) -> Tensor:
    """Numbers of this rank's rows or columns (dim `gone` was summed over) in their place among those of all."""
    if part.dim is None or part.dim == gone:
        return local
    dim = part.dim - (part.dim > gone)
    full = local.new_zeros([n for d, n in enumerate(part.shape) if d != gone])
    full.narrow(dim, part.start, part.length).copy_(local.narrow(dim, 0, part.length))
    return full


def _taken(part: Part, full: Tensor, gone: int, shape: torch.Size) -> Tensor:
    """This rank's numbers, padded with zeros as its part of the tensor is."""
    if part.dim is None or part.dim == gone:
        return full
    dim = part.dim - (part.dim > gone)
    local = full.new_zeros([n for d, n in enumerate(shape) if d != gone])
    local.narrow(dim, 0, part.length).copy_(full.narrow(dim, part.start, part.length))
    return local
