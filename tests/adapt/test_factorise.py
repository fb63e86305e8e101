"""Projections onto factorised matrices: exact where they can be, nearest where they are promised to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from megagpt.model.factorised import down_matrix, up_matrix
from torch import Tensor

from megagpt.adapt.factorise import Direction, factorise, multiplied, truncated
from megagpt.config import ModelConfig
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import NamedNormal
from tests.model.plain_factorised import butterfly_dense, monarch_dense
from tests.tolerances import assert_close

BASE = ModelConfig(n_layers=1, d_model=12, n_heads=4, d_ff=48, seq_len=8, vocab_size=32)
CASES = {
    "low_rank": replace(BASE, mlp="low_rank", mlp_rank=5),
    "low_rank, gated": replace(BASE, mlp="low_rank", mlp_rank=5, activation="swiglu"),
    "monarch": replace(BASE, mlp="monarch", mlp_blocks=4),
    "monarch of rank 3, gated": replace(BASE, mlp="monarch", mlp_blocks=2, activation="swiglu"),
    "butterfly": replace(BASE, mlp="butterfly", d_model=16, d_ff=64),
    "butterfly, uneven": replace(BASE, mlp="butterfly", d_model=20, d_ff=40),
    "butterfly, gated, large": replace(BASE, mlp="butterfly", d_model=52, d_ff=100, activation="swiglu"),
}


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_of_the_kind_is_recovered(name, direction):
    config = CASES[name]
    layer = (up_matrix if direction == "up" else down_matrix)(config, SINGLE, NamedNormal(5, "x", 0.5)).double()
    drawn = {n: p.detach() for n, p in layer.named_parameters() if n != "bias"}
    weight = multiplied(drawn, config, direction)
    found = factorise(weight, config, direction)
    assert {n: p.shape for n, p in found.items()} == {n: p.shape for n, p in drawn.items()}
    again = multiplied(found, config, direction)
    assert_close(again, weight)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_what_they_stand_for_is_what_the_papers_define(direction):
    """`multiplied`, against products written out from the definitions."""
    monarch, found = projected("monarch", direction)
    assert_close(multiplied(found, monarch, direction), monarch_dense(found["first"], found["second"]))
    butterfly, found = projected("butterfly, uneven", direction)
    up = butterfly_dense(found["twiddle"], butterfly.d_model, butterfly.ff_width)
    assert_close(multiplied(found, butterfly, direction), up if direction == "up" else up.T)


def projected(name: str, direction: Direction) -> tuple[ModelConfig, dict[str, Tensor]]:
    config = CASES[name]
    shape = (config.ff_width, config.d_model) if direction == "up" else (config.d_model, config.ff_width)
    return config, factorise(torch.randn(shape, dtype=torch.float64), config, direction)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (3, 9, 14)])
def test_truncation_is_that_of_the_singular_value_decomposition(shape):
    weight = torch.randn(shape, dtype=torch.float64)
    left, right = truncated(weight, 4)
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    assert_close(left @ right, (u[..., :4] * s[..., None, :4]) @ v[..., :4, :])
    torch.testing.assert_close(left.norm(dim=-2), right.norm(dim=-1))


def test_truncation_of_what_has_lower_rank():
    weight = torch.outer(torch.randn(6).double(), torch.randn(9).double())
    left, right = truncated(weight, 3)
    assert left.isfinite().all() and right.isfinite().all()
    assert_close(left @ right, weight)
    left, right = truncated(torch.zeros(6, 9, dtype=torch.float64), 2)
    assert not (left @ right).any()


@pytest.mark.parametrize("name", ["low_rank", "monarch", "monarch of rank 3, gated"])
def test_no_change_of_the_factors_comes_nearer(name):
    """At the nearest point the gradient of the distance is zero, and steps in any direction lead away."""
    config = CASES[name]
    weight = torch.randn(*((2,) if config.gated else ()), config.ff_width, config.d_model, dtype=torch.float64)
    found = factorise(weight, config, "up")
    best = (multiplied(found, config, "up") - weight).norm()
    for _ in range(20):
        for size in (1e-3, 1e-1):
            moved = {n: p + size * torch.randn_like(p) for n, p in found.items()}
            assert (multiplied(moved, config, "up") - weight).norm() > best


def test_the_error_of_monarch_is_what_the_blocks_singular_values_leave():
    config = CASES["monarch of rank 3, gated"]
    weight = torch.randn(2, config.ff_width, config.d_model, dtype=torch.float64)
    blocks = weight.view(2, 2, 24, 2, 6).transpose(2, 3)
    left_over = torch.linalg.svdvals(blocks)[..., 3:].norm()
    error = (multiplied(factorise(weight, config, "up"), config, "up") - weight).norm()
    torch.testing.assert_close(error, left_over)


def test_a_butterfly_near_a_matrix_is_nearer_than_none():
    """A guess, but a good one: of a butterfly with noise on it, no more than the noise is lost."""
    config = CASES["butterfly"]
    drawn = dict(up_matrix(config, SINGLE, NamedNormal(5, "x", 0.5)).double().named_parameters())
    weight = multiplied({"twiddle": drawn["twiddle"].detach()}, config, "up")
    noise = 0.01 * weight.std() * torch.randn_like(weight)
    found = multiplied(factorise(weight + noise, config, "up"), config, "up")
    assert (found - weight).norm() < noise.norm()


def test_numbers_of_32_bits_stay_exact_at_full_rank():
    weight: Tensor = torch.randn(48, 12)
    config = replace(BASE, mlp="low_rank", mlp_rank=12)
    again = multiplied(factorise(weight, config, "up"), config, "up")
    assert_close(again, weight)
