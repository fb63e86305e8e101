"""Column- and row-parallel linear layers, and those of whole heads, against torch.nn.Linear: outputs, all gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megagpt.inventory.parameter import Parameters, column, row
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.collectives import copy_to
from megagpt.parallel.linear import OPEN, SUMMED, ColumnParallelLinear, HeadsLinear, RowParallelLinear
from megagpt.parallel.mesh import build_mesh
from megagpt.parallel.parameter import Declared
from megagpt.parallel.product import product
from megagpt.processes.local import run_ranks
from tests.logical import Parts, assemble, filled, gradient_parts
from tests.tolerances import assert_close, assert_equal

N_INPUTS, N_OUTPUTS, N_ROWS = 12, 8, 6
KINDS = {"column": (ColumnParallelLinear, column), "row": (RowParallelLinear, row)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1), (4,), (3, 5), (32, 1), (33,), (0, 1)], ids=str)
def test_few_rows_give_what_many_do(shape: tuple[int, ...], dtype: torch.dtype):
    x, weight, bias = torch.randn(*shape, 1024), torch.randn(520, 1024), torch.randn(520)
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    with torch.no_grad():
        for b in (None, bias):
            y = product(x, weight, b)
            assert y.is_contiguous() and y.dtype == dtype
            expected = nn.functional.linear(x.double(), weight.double(), None if b is None else b.double())
            assert_close(y, expected, dtype=dtype)


def declared(parameters: Parameters) -> Declared:
    return Declared("layer", parameters)


def model_axis() -> Axis:
    return build_mesh("cpu", pp=1, dp=1, tp=torch.distributed.get_world_size()).model


def run_layer(kind: str, full: dict[str, Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Parts]:
    """On each rank: output, input gradient and parameter gradients, for the whole or this rank's part of x and dy."""
    axis, (layer_class, declare) = model_axis(), KINDS[kind]
    layer = filled(layer_class(declared(declare(N_INPUTS, N_OUTPUTS)), axis), full)
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


def run_open(full: dict[str, dict[str, Tensor]], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers between one entrance and one exit, on each rank: output and input gradient."""
    axis = model_axis()
    up = filled(ColumnParallelLinear(declared(column(N_INPUTS, N_OUTPUTS, bias=False)), axis, OPEN), full["up"])
    down = filled(RowParallelLinear(declared(row(N_OUTPUTS, N_INPUTS, bias=False)), axis, OPEN), full["down"])
    x = x.clone().requires_grad_()
    y = SUMMED.leave(down(up(SUMMED.enter(x, axis))), axis)
    y.backward(dy)
    assert x.grad is not None
    return y.detach(), x.grad


def test_open_layers_leave_the_sums_to_who_holds_them():
    full = {"up": torch.randn(N_OUTPUTS, N_INPUTS).double(), "down": torch.randn(N_INPUTS, N_OUTPUTS).double()}
    x, dy = torch.randn(2, 5, N_INPUTS).double(), torch.randn(2, 5, N_INPUTS).double()
    for y, x_grad in run_ranks(run_open, 2, {name: {"weight": w} for name, w in full.items()}, x, dy):
        assert_close(y, x @ full["up"].T @ full["down"].T, "output")
        assert_close(x_grad, dy @ full["down"] @ full["up"], "input gradient")


def test_terms_of_a_sum_have_no_bias():
    with pytest.raises(ValueError, match="got terms of a sum with a bias, which would be added on every rank"):
        RowParallelLinear(declared(row(4, 4)), SINGLE, OPEN)


@pytest.mark.parametrize(("kind", "what"), [("column", "outputs"), ("row", "inputs")])
def test_sizes_that_do_not_divide_are_an_error(kind, what):
    layer_class, declare = KINDS[kind]
    with pytest.raises(ValueError, match=rf"got 10 {what} on an axis of 3 processes, wanted a multiple of 3"):
        layer_class(declared(declare(10, 10)), Axis(group=None, rank=0, size=3))


def heads_of(rank: int, n_ranks: int, n_heads: int) -> slice:
    """The rows of the heads that a rank computes."""
    first, last = rank * n_heads // n_ranks, max((rank + 1) * n_heads // n_ranks, rank * n_heads // n_ranks + 1)
    return slice(first * N_ROWS, last * N_ROWS)


def run_heads(n_heads: int, full: dict[str, Tensor], x: Tensor, dys: list[Tensor]) -> tuple[Tensor, Tensor, Parts]:
    """On each rank: output, the input's gradient, parameter gradients. dys: of each rank's own output."""
    axis = model_axis()
    layer = filled(HeadsLinear(declared(column(N_INPUTS, n_heads * N_ROWS, heads=n_heads)), axis), full)
    x = x.clone().requires_grad_()
    y = layer(copy_to(x, axis))
    y.backward(dys[axis.rank])
    assert x.grad is not None
    return y.detach(), x.grad, gradient_parts(layer.named_parameters())


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_heads_equal_nn_linear_with_fewer_heads_than_ranks_too(n_heads, n_ranks):
    reference = nn.Linear(N_INPUTS, n_heads * N_ROWS, dtype=torch.float64)
    full = {name: p.detach().clone() for name, p in reference.named_parameters()}
    x = torch.randn(2, 5, N_INPUTS, dtype=torch.float64)
    places = [heads_of(rank, n_ranks, n_heads) for rank in range(n_ranks)]
    dys = [torch.randn(2, 5, place.stop - place.start, dtype=torch.float64) for place in places]
    x_ref = x.clone().requires_grad_()
    y_ref = reference(x_ref)
    dy_ref = torch.zeros_like(y_ref)
    for place, dy in zip(places, dys, strict=True):  # what neighbours do with the same head adds up
        dy_ref[..., place] += dy
    y_ref.backward(dy_ref)

    ranks = run_ranks(run_heads, n_ranks, n_heads, full, x, dys)
    assert x_ref.grad is not None
    for (y, x_grad, _), place in zip(ranks, places, strict=True):
        assert_close(y, y_ref.detach()[..., place], "output")
        assert_close(x_grad, x_ref.grad, "input gradient")
        assert_equal(x_grad, ranks[0][1], "ranks")
    for name, grad in assemble(parts for _, _, parts in ranks).items():
        wanted = reference.get_parameter(name).grad
        assert wanted is not None
        assert_close(grad, wanted, f"gradient of {name}")


def test_heads_that_ranks_cannot_share_are_an_error():
    with pytest.raises(ValueError, match="got 4 heads on an axis of 6 processes, wanted one to divide the other"):
        HeadsLinear(declared(column(12, 24, heads=4)), Axis(group=None, rank=0, size=6))
