"""Parts of logical tensors, and what a module makes of what is declared."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megagpt.errors import UserError
from megagpt.inventory.parameter import Init, Parameter, column
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.parameter import Declared, declared_of, named_parameters, part_of
from tests.logical import drawn
from tests.tolerances import assert_equal

NORMAL = Init("normal", 0.02)


def of(full: Tensor, dim: int | None, axis: Axis, pad_to: int = 1) -> nn.Parameter:
    """A parameter of this shape, filled with the part of `full` that a rank has."""
    declared = Declared("a", {"w": Parameter(tuple(full.shape), "map", NORMAL, sharded=dim, pad_to=pad_to)})
    parameter = declared.make("w", axis)
    part_of(parameter).unpadded(parameter.data).copy_(part_of(parameter).take(full))
    return parameter


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("size", "n_ranks"), [(12, 4), (211, 2), (211, 4), (5, 4), (1, 2)])
def test_shards_are_the_chunks_of_torch(size, n_ranks, dim):
    full = torch.randn((size, 3) if dim == 0 else (3, size))
    chunks = [*full.chunk(n_ranks, dim=dim), *[full.narrow(dim, 0, 0)] * n_ranks][:n_ranks]
    for rank, chunk in enumerate(chunks):
        parameter = of(full, dim, Axis(group=None, rank=rank, size=n_ranks), pad_to=8)
        part = part_of(parameter)
        assert_equal(part.take(full), chunk)
        assert_equal(part.unpadded(parameter.detach()), chunk)
        assert parameter.shape[dim] % 8 == 0 and parameter.count_nonzero() == chunk.numel()


def test_a_parameter_that_is_not_cut_is_whole_everywhere():
    full = torch.randn(3, 2)
    parameter = of(full, None, Axis(group=None, rank=1, size=2))
    assert_equal(part_of(parameter).take(full), full)
    assert_equal(part_of(parameter).unpadded(parameter.detach()), full)


def test_part_follows_a_parameter_through_dtype_changes():
    module = torch.nn.Module()
    module.weight = of(torch.randn(4, 2), 0, SINGLE)
    part = part_of(module.weight)
    assert part_of(module.to(torch.float64).weight) is part


def test_a_module_makes_its_part_of_what_is_declared_under_its_name():
    whole = Declared("block", {f"up.{name}": p for name, p in column(6, 4, 0.02).items()}, seed=7)
    up, axis = whole.at("up"), Axis(group=None, rank=1, size=2)
    weight = up.make("weight", axis)
    assert_equal(weight.detach(), drawn(NORMAL, (4, 6), "block.up.weight", 7)[2:])
    assert declared_of(weight) is whole.parameters["up.weight"]
    assert up.make_if_any("gain", axis) is None and whole.at("down").parameters == {}


@pytest.mark.parametrize(("n_heads", "tp", "rows"), [(4, 2, 6), (2, 4, 12), (1, 2, 12)])
def test_a_head_is_not_cut(n_heads, tp, rows):
    """With more ranks than heads every rank holds all."""
    weight = Declared("kv", column(5, 12, heads=n_heads)).make("weight", Axis(group=None, rank=0, size=tp))
    assert weight.shape == (rows, 5) and declared_of(weight).local_size(tp) == weight.numel()


def test_a_parameter_that_no_layer_declares_is_named():
    layer = nn.Linear(2, 2)
    (named, _) = named_parameters(layer)
    for read in (lambda: named.part, lambda: named.declared):
        with pytest.raises(UserError, match=r"^weight is a parameter that its layer does not declare.*Declared\.make$"):
            read()
