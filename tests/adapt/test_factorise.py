"""Projections onto factorised matrices: exact where they can be, nearest where they are promised to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megagpt.adapt.factorise import factorise, multiplied
from megagpt.config import ModelConfig
from megagpt.model.mlp import MLPS
from megagpt.model.mlp.kind import Direction
from tests.logical import drawn
from tests.model.mlp.plain_factorised import butterfly_dense, monarch_dense
from tests.tolerances import assert_close

BASE = ModelConfig(n_layers=1, d_model=12, n_heads=4, d_ff=48, seq_len=8, vocab_size=32, init="normal", init_std=0.5)
CASES = {
    "low_rank": replace(BASE, mlp="low_rank", mlp_rank=5),
    "low_rank, gated": replace(BASE, mlp="low_rank", mlp_rank=5, activation="swiglu"),
    "monarch": replace(BASE, mlp="monarch", mlp_blocks=4),
    "monarch of rank 3, gated": replace(BASE, mlp="monarch", mlp_blocks=2, activation="swiglu"),
    "butterfly": replace(BASE, mlp="butterfly", d_model=16, d_ff=64),
    "butterfly, uneven": replace(BASE, mlp="butterfly", d_model=20, d_ff=40),
    "butterfly, gated, large": replace(BASE, mlp="butterfly", d_model=52, d_ff=100, activation="swiglu"),
}


def of_the_kind(config: ModelConfig, direction: Direction) -> dict[str, Tensor]:
    """Parameters as they are drawn, in float64."""
    kind = MLPS[config.mlp](config)
    declared = kind.up() if direction == "up" else kind.down()
    return {n: drawn(p.init, p.shape, n, 5).double() for n, p in declared.items() if n != "bias"}


@pytest.mark.parametrize("direction", ["up", "down"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_of_the_kind_is_recovered(name, direction):
    config = CASES[name]
    ours = of_the_kind(config, direction)
    weight = multiplied(ours, config, direction)
    found = factorise(weight, config, direction)
    assert {n: p.shape for n, p in found.items()} == {n: p.shape for n, p in ours.items()}
    assert all(p.is_contiguous() and p.dtype == weight.dtype for p in found.values())
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
    weight = multiplied(of_the_kind(config, "up"), config, "up")
    noise = 0.01 * weight.std() * torch.randn_like(weight)
    found = multiplied(factorise(weight + noise, config, "up"), config, "up")
    assert (found - weight).norm() < noise.norm()


def test_numbers_of_32_bits_stay_exact_at_full_rank():
    weight: Tensor = torch.randn(48, 12)
    config = replace(BASE, mlp="low_rank", mlp_rank=12)
    again = multiplied(factorise(weight, config, "up"), config, "up")
    assert_close(again, weight)
