"""Dropout: its generator against published vectors, its kernel against its reference to the bit, its mask's statistics.

What every op is held to, gradients among them, is in test_every_op.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megagpt.ops.bias_dropout_add import bias_dropout_add
from megagpt.ops.dropout import dropout
from megagpt.ops.library import EMULATED_CUDA, KERNEL_DTYPES, MISSING_KERNELS, has_kernel, kernel_status
from megagpt.philox import philox_reference
from tests.tolerances import assert_equal

needs_kernel = pytest.mark.skipif(not has_kernel("dropout", "cpu"), reason=f"no compiled kernel: {MISSING_KERNELS}")
IMPLEMENTATIONS = ["reference", pytest.param("cpu", marks=needs_kernel)]

# Random123's kat_vectors for philox4x32 with 10 rounds: counter words, key words, result words.
KNOWN_ANSWERS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def hex_words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def mask(shape: tuple[int, ...], ids: Tensor, *, p: float = 0.5, seed: int = 7, site: int = 3, offset: int = 0):
    """Which elements are kept."""
    return dropout(torch.ones(shape), ids, p=p, seed=seed, site=site, offset=offset) != 0


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_reference_generator_gives_the_published_words(counter, key, expected):
    c = hex_words(counter)
    halves = [torch.tensor((hi << 32 | lo) - (hi >> 31 << 64)) for lo, hi in (c[:2], c[2:])]  # as signed int64
    words = philox_reference(*halves, tuple(hex_words(key)))
    assert [int(w) for w in words] == hex_words(expected)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_op_draws_the_published_words(kernels):
    # The op shows a word only as "kept iff word >= p * 2^32": kept at p = word / 2^32, dropped one step above.
    ids = torch.zeros(1, dtype=torch.int64)
    for lane, word in enumerate(hex_words(KNOWN_ANSWERS[0][2])):
        for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
            y = dropout(torch.ones(1, 4), ids, p=p, seed=0, site=0, kernels=kernels)
            assert bool(y[0, lane] != 0) is kept


def require_same_bits(x: Tensor, ids: Tensor, **mask) -> None:
    """Kernel and reference agree in every bit, the sign of zero included."""
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    kernel, reference = (dropout(x, ids, **mask, kernels=kernels) for kernels in ("cpu", "reference"))
    assert_equal(kernel.view(bits), reference.view(bits))


@needs_kernel
@pytest.mark.parametrize("dtype", KERNEL_DTYPES["cpu"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 7), (1, 257), (5, 1023), (2, 5000), (0, 4), (3, 0), (4,)])
@pytest.mark.parametrize("offset", [0, 1, 3, 258, 2**33 + 4])
def test_kernel_equals_reference_bitwise(dtype, shape, offset):
    x, ids = torch.randn(shape).to(dtype), torch.randint(0, 2**40, shape[:1])
    require_same_bits(x, ids, p=0.3, seed=2**32 - 1, site=77, offset=offset)


@needs_kernel
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.999])
def test_kernel_equals_reference_for_any_p(p):
    require_same_bits(torch.randn(3, 4097), torch.arange(3), p=p, seed=1, site=2, offset=9)


@needs_kernel
def test_keys_are_taken_modulo_32_bits():
    x, ids = torch.randn(2, 50), torch.arange(2)
    for seed in (5, 2**32 + 5, 5 - 2**32):
        require_same_bits(x, ids, p=0.5, seed=seed, site=1)
        assert_equal(mask(x.shape, ids, seed=seed), mask(x.shape, ids, seed=5))


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
@pytest.mark.parametrize(("first", "rows", "columns"), [((1, 2, 3), 4, 5), ((0, 0, 0), 7, 11), ((2, 6, 8), 1, 1)])
def test_a_part_of_matrices_has_its_part_of_the_mask(kernels, first, rows, columns):
    x, ids, (head, row, column) = torch.randn(2, 3, 7, 11), torch.arange(2), first
    mask = {"p": 0.5, "seed": 1, "site": 2, "kernels": kernels}
    parts = (..., slice(head, None), slice(row, row + rows), slice(column, column + columns))
    offset = 5 + (head * 7 + row) * 11 + column
    whole, part = dropout(x, ids, offset=5, **mask), dropout(x[parts], ids, offset=offset, within=(7, 11), **mask)
    assert_equal(part, whole[parts])


def test_a_part_that_is_larger_than_the_matrix_is_an_error():
    with pytest.raises(ValueError, match=r"wanted \(B, \*, up to 2, up to 2\)"):
        dropout(torch.ones(1, 2, 3), torch.zeros(1, dtype=torch.int64), p=0.5, seed=0, site=0, within=(2, 2))


@needs_kernel
@pytest.mark.parametrize("n", [1, 4, 7, 1030])
def test_gradient_has_the_mask_of_the_result(n):
    x = torch.randn(2, n, requires_grad=True)
    y = dropout(x, torch.arange(2), p=0.4, seed=3, site=4, offset=n, kernels="cpu")
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert_equal(dx != 0, y != 0)


def test_kept_elements_are_scaled_and_dropped_ones_are_zero_even_if_not_finite():
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, 2.0]).repeat(2, 100)
    y = dropout(x, torch.arange(2), p=0.25, seed=5, site=1)
    kept = mask(x.shape, torch.arange(2), p=0.25, seed=5, site=1)
    assert 0 < kept.sum() < kept.numel()
    assert_equal(y[~kept], torch.zeros_like(y[~kept]))
    assert_equal(y[kept], (x * (1 / 0.75))[kept])


def test_p_zero_is_the_identity():
    x = torch.randn(2, 100)
    assert_equal(dropout(x, torch.arange(2), p=0.0, seed=1, site=1), x)


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5, math.nan])
def test_p_out_of_range_is_an_error(p):
    with pytest.raises(ValueError, match=r"got p=.*wanted 0 <= p < 1"):
        dropout(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), p=p, seed=0, site=0)


def test_wrong_number_of_ids_is_an_error():
    with pytest.raises(ValueError, match="wanted an id per sample"):
        dropout(torch.ones(2, 3), torch.zeros(1, dtype=torch.int64), p=0.1, seed=0, site=0)


@pytest.mark.skipif(bool(EMULATED_CUDA), reason="CUDA kernels have no float64")
@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_gradient_has_a_gradient(kernels):
    ids = torch.tensor([4, 9])
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    mask = {"p": 0.4, "seed": 1, "site": 2, "offset": 6, "kernels": kernels}
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, ids, **mask), x)


def test_mask_keeps_the_right_share():
    n, p = 2**20, 0.1
    kept = mask((4, n // 4), torch.arange(4), p=p).sum().item()
    assert abs(kept - n * (1 - p)) < 5 * math.sqrt(n * p * (1 - p))


@pytest.mark.parametrize("what", ["site", "seed", "sample", "neighbour", "lane"])
def test_masks_are_independent(what):
    n, ids = 2**18, torch.zeros(1, dtype=torch.int64)
    whole = mask((1, n + 4), ids)[0]
    a = whole[:n]
    b = {
        "site": lambda: mask((1, n), ids, site=4)[0],
        "seed": lambda: mask((1, n), ids, seed=8)[0],
        "sample": lambda: mask((1, n), ids + 1)[0],
        "neighbour": lambda: whole[1 : n + 1],
        "lane": lambda: whole[4 : n + 4],
    }[what]()
    # At p = 0.5 two independent masks agree on half of the elements.
    assert abs((a == b).sum().item() - n / 2) < 5 * math.sqrt(n) / 2


def test_shards_of_heads_and_of_the_sequence_are_parts_of_the_whole_mask():
    ids = torch.tensor([3, 11, 12])
    B, H, T, D = 3, 4, 7, 6
    whole_BHTT, whole_BTD = mask((B, H, T, T), ids), mask((B, T, D), ids)
    heads = [mask((B, 2, T, T), ids, offset=first * T * T) for first in (0, 2)]
    assert_equal(torch.cat(heads, dim=1), whole_BHTT)
    times = [mask((B, end - start, D), ids, offset=start * D) for start, end in ((0, 3), (3, 7))]
    assert_equal(torch.cat(times, dim=1), whole_BTD)
    assert_equal(mask((1, H, T, T), ids[1:2]), whole_BHTT[1:2])  # another micro-batch


def test_threads_do_not_change_the_mask():
    x, ids = torch.randn(2, 100_003), torch.arange(2)
    results = []
    for n_threads in (1, 2):
        torch.set_num_threads(n_threads)
        results.append(dropout(x, ids, p=0.1, seed=1, site=1))
    assert_equal(*results)


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_bias_dropout_add_has_the_mask_of_dropout(kernels):
    ids, where = torch.tensor([3, 2**40]), {"p": 0.3, "seed": 7, "site": 3, "offset": 5}
    x = torch.randn(2, 9, 33, requires_grad=True)
    bias = torch.zeros(33, requires_grad=True)
    fused = bias_dropout_add(x, bias, torch.zeros_like(x), ids, **where, kernels=kernels)
    alone = dropout(x, ids, **where)
    assert_equal(fused, alone)
    assert_equal(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (fused, alone)))


@pytest.mark.parametrize("kernels", IMPLEMENTATIONS)
def test_bias_dropout_add_rounds_once(kernels):
    # 1 + 2^-9 is no bfloat16: rounded in between, the sum would be 0.
    one, small = torch.ones(1, 1, dtype=torch.bfloat16), torch.full((1,), 2**-9, dtype=torch.bfloat16)
    y = bias_dropout_add(one, small, -one, torch.zeros(1, dtype=torch.int64), p=0.0, seed=0, site=0, kernels=kernels)
    assert y.item() == 2**-9


@pytest.mark.parametrize(
    ("x", "bias", "residual", "message"),
    [
        (torch.ones(2), None, torch.ones(2), r"got x \(2,\), wanted \(B, \*, D\)"),
        (torch.ones(2, 3), torch.ones(2), torch.ones(2, 3), r"got bias \(2,\).*wanted \(3,\)"),
        (torch.ones(2, 3), None, torch.ones(2, 4), r"got residual \(2, 4\).*wanted \(2, 3\)"),
        (torch.ones(2, 3), None, torch.ones(2, 3).double(), "got residual .*float64, wanted .*float32"),
    ],
)
def test_inputs_that_do_not_fit_are_an_error(x, bias, residual, message):
    with pytest.raises(ValueError, match=message):
        bias_dropout_add(x, bias, residual, torch.arange(2), p=0.1, seed=0, site=0)


@needs_kernel
def test_status_names_the_kernel():
    assert kernel_status("dropout", "cpu")[0] == "cpu kernel"
    if "CUDA" not in torch.__config__.show():
        assert kernel_status("dropout", "cuda")[0] == "reference"
