"""Projections onto whole heads against torch.nn.Linear: outputs and every gradient, with fewer heads than ranks too."""

from __future__ import annotations

import pytest
import torch
from megagpt.parallel.kv_linear import HeadsLinear
from torch import Tensor, nn

from megagpt.parallel.axis import Axis
from megagpt.parallel.collectives import copy_to
from megagpt.parallel.mesh import build_mesh
from megagpt.processes.local import run_ranks
from tests.logical import Parts, assemble, gradient_parts
from tests.tolerances import assert_close, assert_equal

N_INPUTS, N_ROWS = 12, 6


def heads_of(rank: int, n_ranks: int, n_heads: int) -> slice:
    """The rows of the heads that a rank computes."""
    first, last = rank * n_heads // n_ranks, max((rank + 1) * n_heads // n_ranks, rank * n_heads // n_ranks + 1)
    return slice(first * N_ROWS, last * N_ROWS)


def run_layer(n_heads: int, full: dict[str, Tensor], x: Tensor, dys: list[Tensor]) -> tuple[Tensor, Tensor, Parts]:
    """On each rank: output, the input's gradient, parameter gradients. dys: of each rank's own output."""
    axis = build_mesh("cpu", pp=1, dp=1, tp=torch.distributed.get_world_size()).model
    layer = HeadsLinear(N_INPUTS, n_heads, N_ROWS, axis, draw=lambda name, shape: full[name])
    x = x.clone().requires_grad_()
    y = layer(copy_to(x, axis))
    y.backward(dys[axis.rank])
    assert x.grad is not None
    return y.detach(), x.grad, gradient_parts(layer.named_parameters())


@pytest.mark.parametrize("n_ranks", [1, 2, 4])
@pytest.mark.parametrize("n_heads", [1, 2, 4])
def test_layer_equals_nn_linear(n_heads, n_ranks):
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

    ranks = run_ranks(run_layer, n_ranks, n_heads, full, x, dys)
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
        HeadsLinear(12, 4, 6, Axis(group=None, rank=0, size=6))
