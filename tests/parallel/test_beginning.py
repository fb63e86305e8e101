"""First values: the same element whoever holds it, in the time and memory of what is held."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from megagpt.inventory.parameter import ONES, ZEROS, Init, Parameter
from megagpt.parallel import beginning
from megagpt.parallel.axis import Axis
from megagpt.parallel.beginning import Beginning
from megagpt.parallel.parameter import Declared, give_memory, held, part_of
from tests.live_bytes import LiveBytes
from tests.logical import drawn
from tests.tolerances import assert_close, assert_equal

NORMAL, ROTATIONS = Init("normal", 0.02), Init("rotations", 3.0)


@pytest.mark.parametrize("init", [NORMAL, ROTATIONS], ids=lambda init: init.kind)
def test_draw_is_a_function_of_seed_and_name(init: Init):
    shape = (50, 40, 2, 2)
    base = drawn(init, shape, "a.weight", 1)
    assert_equal(drawn(init, shape, "a.weight", 1), base)
    for other in (drawn(init, shape, "a.weight", 2), drawn(init, shape, "b.weight", 1)):
        assert (other == base).sum() < 5
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert_equal(drawn(init, shape, "a.weight", 1), base, "the global generator plays no part")
    assert torch.equal(torch.get_rng_state(), state)


def test_scale_is_the_standard_deviation():
    n = 2**18
    w = drawn(NORMAL, (n,), "layer.weight", 3) / NORMAL.scale
    assert abs(w.square().mean().item() - 1) < 5 * math.sqrt(2 / n)


def test_rotations_turn_and_scale():
    R = drawn(ROTATIONS, (500, 2, 2), "a.twiddle", 1).double() / ROTATIONS.scale
    assert_close(R @ R.mT, torch.eye(2).double().expand_as(R), dtype=torch.float32)
    assert_close(torch.linalg.det(R), torch.ones(500).double(), dtype=torch.float32)
    cosines = R[:, 0, 0]
    assert abs(cosines.mean().item()) < 5 * math.sqrt(0.5 / 500)  # angles all round: a mean of 0, a variance of 1/2


def test_biases_are_zero_and_gains_one():
    assert_equal(drawn(ZEROS, (3,), "bias", 1), torch.zeros(3))
    assert_equal(drawn(ONES, (3,), "gain", 1), torch.ones(3))


@pytest.mark.parametrize(
    ("shape", "dim", "pad_to"),
    [((12, 6), 0, 1), ((6, 12), 1, 1), ((11, 5), 0, 8), ((3, 7, 5), 1, 4), ((2, 3, 9), 2, 1)],
)
@pytest.mark.parametrize("tp", [1, 3])
def test_any_elements_of_any_part_are_those_of_the_logical_tensor(shape: tuple, dim: int, pad_to: int, tp: int):
    """As ZeRO cuts them, anywhere; padding is zero."""
    declared = Parameter(shape, "map", NORMAL, sharded=dim, pad_to=pad_to)
    full = drawn(NORMAL, shape, "w", 4)
    for rank in range(tp):
        part = held(declared, Axis(group=None, rank=rank, size=tp))
        local = torch.zeros(declared.local_shape(tp))
        part.unpadded(local).copy_(part.take(full))
        begins = Beginning(NORMAL, part, declared.local_shape(tp), 4, "w")
        for start in range(local.numel()):
            for length in {1, 3, local.numel() - start}:
                wanted = local.view(-1)[start : start + length]
                assert_equal(begins.elements(start, len(wanted)), wanted, f"{rank}: {length} from {start}")


def test_a_rank_draws_and_holds_its_shard_alone(monkeypatch: pytest.MonkeyPatch):
    """Elements drawn, and the most bytes at once, of 1 / tp of a matrix: nothing is made whole."""
    n_drawn, fill = [], beginning.fill_normal

    def counted(out_N: torch.Tensor, *arguments: object) -> None:
        n_drawn.append(len(out_N))
        fill(out_N, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(beginning, "fill_normal", counted)
    for dim in (0, 1):
        declared = Declared("mlp", {"weight": Parameter((384, 256), "map", NORMAL, sharded=dim)})
        n_drawn.clear()
        with LiveBytes() as memory:
            weight = declared.make("weight", Axis(group=None, rank=5, size=8))
        assert sum(n_drawn) == weight.numel() == 384 * 256 // 8
        assert memory.peak == 4 * weight.numel()


def test_an_empty_parameter_has_a_shape_and_no_memory():
    declared = Declared("mlp", {"weight": Parameter((11, 4), "map", NORMAL, sharded=0, pad_to=4)}, empty=True)
    with LiveBytes() as memory:
        weight = declared.make("weight", Axis(group=None, rank=1, size=2))
    assert weight.shape == (8, 4) and memory.peak <= 4
    give_memory(weight, dtype=torch.bfloat16)
    assert isinstance(weight, nn.Parameter) and weight.dtype == torch.bfloat16 and part_of(weight).length == 5
    assert weight.data[5:].count_nonzero() == 0 and weight.untyped_storage().nbytes() == 2 * 32
