"""Column- and row-parallel linear layers against torch.nn.Linear: outputs and every gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megagpt.parallel.axis import SINGLE
from megagpt.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks
from tests.logical import Parts, assemble, gradient_parts
from tests.tolerances import assert_close, assert_equal

N_INPUTS, N_OUTPUTS = 12, 8


def run_layer(kind: str, full: dict[str, Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Parts]:
    """On each rank: output, input gradient and parameter gradients, for the whole or this rank's part of x and dy."""
    axis = build_mesh("cpu", pp=1, dp=1, tp=torch.distributed.get_world_size()).model
    layer_class = {"column": ColumnParallelLinear, "row": RowParallelLinear}[kind]
    layer = layer_class(N_INPUTS, N_OUTPUTS, axis, draw=lambda name, shape: full[name])
    x = (x if kind == "column" else x.chunk(axis.size, dim=-1)[axis.rank]).clone().requires_grad_()
    y = layer(x)
    y.backward(dy.chunk(axis.size, dim=-1)[axis.rank] if kind == "column" else dy)
    assert x.grad is not None
    return y.detach(), x.grad, gradient_parts(layer.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_layer_equals_nn_linear(kind, tp, dtype):
    reference = nn.Linear(N_INPUTS, N_OUTPUTS, dtype=dtype)
    full = {name: p.detach().clone() for name, p in reference.named_parameters()}
    x, dy = torch.randn(2, 5, N_INPUTS, dtype=dtype), torch.randn(2, 5, N_OUTPUTS, dtype=dtype)
    x_ref = x.clone().requires_grad_()
    y_ref = reference(x_ref)
    y_ref.backward(dy)

    outputs, x_grads, grads = zip(*run_ranks(run_layer, tp, kind, full, x, dy), strict=True)

    if kind == "column":  # outputs are shared out, the input is everywhere
        y, equal = torch.cat(outputs, dim=-1), x_grads
        x_grad = x_grads[0]
    else:
        y, equal = outputs[0], outputs
        x_grad = torch.cat(x_grads, dim=-1)
    for other in equal:
        assert_equal(other, equal[0], "ranks")
    assert_close(y, y_ref.detach(), "output")
    assert_close(x_grad, x_ref.grad, "input gradient")
    for name, grad in assemble(grads).items():
        assert_close(grad, reference.get_parameter(name).grad, f"gradient of {name}")


@pytest.mark.parametrize(("layer_class", "what"), [(ColumnParallelLinear, "outputs"), (RowParallelLinear, "inputs")])
def test_sizes_that_do_not_divide_are_an_error(layer_class, what):
    axis = type(SINGLE)(group=None, rank=0, size=3)
    with pytest.raises(ValueError, match=rf"got 10 {what} on an axis of 3 processes, wanted a multiple of 3"):
        layer_class(10, 10, axis)
