"""The collectives' gradients against those of the dense function that the ranks compute together."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megagpt.parallel.axis import SINGLE
from megagpt.parallel.collectives import all_reduce, copy_to, gather_from, reduce_from
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks
from tests.tolerances import assert_close, assert_equal

COLLECTIVES = {"copy": copy_to, "reduce": reduce_from, "gather": gather_from}


def run_collective(kind: str, xs: list[Tensor], weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Output and input gradient of this rank, the loss being the sum of output * weight. The input stays as it is."""
    axis = build_mesh("cpu", pp=1, dp=1, tp=len(xs)).model
    x = xs[axis.rank].clone().requires_grad_()
    y = COLLECTIVES[kind](x, axis)
    y.backward(weights[axis.rank].expand_as(y))
    assert torch.equal(x, xs[axis.rank]) and x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("kind", list(COLLECTIVES))
def test_gradient_is_that_of_the_dense_function(kind, tp):
    inputs = [torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(tp)]
    if kind == "copy":
        # One input, held by all; each rank goes on by itself, and the loss is the sum of theirs.
        inputs = [inputs[0]] * tp
        weights = [torch.randn(3, 4, dtype=torch.float64) for _ in range(tp)]
        expected = inputs
    elif kind == "reduce":
        # One output, held by all; each rank computes the same loss, which counts once.
        weights = [torch.randn(3, 4, dtype=torch.float64)] * tp
        expected = [torch.stack(inputs).sum(0)] * tp
    else:
        weights = [torch.randn(3, 4 * tp, dtype=torch.float64)] * tp
        expected = [torch.cat(inputs, dim=-1)] * tp
    losses = [(y * w).sum() for y, w in zip(expected, weights, strict=True)]
    loss = torch.stack(losses).sum() if kind == "copy" else losses[0]
    dense_grads = torch.autograd.grad(loss, inputs)

    results = run_ranks(run_collective, tp, kind, [x.detach() for x in inputs], weights)

    for rank, (y, grad) in enumerate(results):
        assert_close(y, expected[rank].detach(), f"output of rank {rank}")
        assert_close(grad, dense_grads[rank], f"gradient of rank {rank}")


def test_strided_inputs(tp=2):
    for kind in COLLECTIVES:
        x, w = torch.randn(4, 6).t(), torch.randn(())  # an expanded weight is a gradient without memory of its own
        for y, _ in run_ranks(run_collective, tp, kind, [x] * tp, [w] * tp):
            assert_close(y, {"copy": x, "reduce": tp * x, "gather": torch.cat([x] * tp, dim=-1)}[kind], kind)


@pytest.mark.parametrize("function", [*COLLECTIVES.values(), all_reduce])
def test_identity_on_an_axis_of_size_1(function):
    assert not dist.is_initialized()
    x = torch.randn(3)
    assert function(x, SINGLE) is x


def reduce_max(xs: list[Tensor]) -> Tensor:
    axis = build_mesh("cpu", pp=1, dp=1, tp=len(xs)).model
    x = xs[axis.rank].clone()
    y = all_reduce(x, axis, dist.ReduceOp.MAX)
    assert torch.equal(x, xs[axis.rank])
    return y


def test_all_reduce_takes_the_operation_and_leaves_its_input_alone():
    xs = [torch.randn(5), torch.randn(5)]
    for y in run_ranks(reduce_max, 2, xs):
        assert_equal(y, torch.maximum(*xs))
