"""Parts of logical tensors, and initial weights that do not depend on the layout."""

from __future__ import annotations

import math

import pytest
import torch

from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.parameter import NamedNormal, part_of, replicated, sharded
from tests.tolerances import assert_equal


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("size", "n_ranks"), [(12, 4), (211, 2), (211, 4), (5, 4), (1, 2)])
def test_shards_are_the_chunks_of_torch(size, n_ranks, dim):
    full = torch.randn((size, 3) if dim == 0 else (3, size))
    chunks = [*full.chunk(n_ranks, dim=dim), *[full.narrow(dim, 0, 0)] * n_ranks][:n_ranks]
    for rank, chunk in enumerate(chunks):
        parameter = sharded(full, dim, Axis(group=None, rank=rank, size=n_ranks), pad_to=8)
        part = part_of(parameter)
        assert_equal(part.take(full), chunk)
        assert_equal(part.unpadded(parameter.detach()), chunk)
        assert parameter.shape[dim] % 8 == 0 and parameter.count_nonzero() == chunk.numel()


def test_replicated_parameter_is_whole_everywhere():
    full = torch.randn(3, 2)
    parameter = replicated(full)
    assert_equal(part_of(parameter).take(full), full)
    assert_equal(part_of(parameter).unpadded(parameter.detach()), full)


def test_part_follows_a_parameter_through_dtype_changes():
    module = torch.nn.Module()
    module.weight = sharded(torch.randn(4, 2), 0, SINGLE)
    part = part_of(module.weight)
    assert part_of(module.to(torch.float64).weight) is part


def test_draw_is_a_function_of_seed_and_name():
    shape = (50, 40)
    base = NamedNormal(1, "a")("weight", shape)
    assert_equal(NamedNormal(1, "a")("weight", shape), base)
    for other in (NamedNormal(2, "a")("weight", shape), NamedNormal(1, "b")("weight", shape)):
        assert (other == base).sum() == 0
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert_equal(NamedNormal(1, "a")("weight", shape), base, "the global generator plays no part")
    assert torch.equal(torch.get_rng_state(), state)


def test_draw_has_its_distribution():
    n, std = 2**18, 0.02
    w = NamedNormal(3, "layer", std)("weight", (n,)) / std
    assert abs(w.mean().item()) < 5 / math.sqrt(n)
    assert abs(w.square().mean().item() - 1) < 5 * math.sqrt(2 / n)
    assert abs(w.pow(4).mean().item() - 3) < 5 * math.sqrt(96 / n)  # the fourth moment of a normal


def test_biases_are_zero_and_gains_one():
    assert_equal(NamedNormal(1, "a")("bias", (3,)), torch.zeros(3))
    assert_equal(NamedNormal(1, "a")("gain", (3,)), torch.ones(3))
