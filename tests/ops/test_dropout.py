"""The dropout op: its generator against published vectors, its kernel against its reference, its mask's statistics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megagpt.ops.dropout import _reference, dropout, philox_reference
from megagpt.ops.library import MISSING_KERNELS, kernel_status
from tests.tolerances import assert_equal

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
needs_kernel = pytest.mark.skipif(MISSING_KERNELS is not None, reason=f"no compiled kernels: {MISSING_KERNELS}")

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


@pytest.mark.parametrize("implementation", [dropout, _reference])
def test_op_draws_the_published_words(implementation):
    # The op shows a word only as "kept iff word >= p * 2^32": kept at p = word / 2^32, dropped one step above.
    ids = torch.zeros(1, dtype=torch.int64)
    for lane, word in enumerate(hex_words(KNOWN_ANSWERS[0][2])):
        for p, kept in ((word / 2**32, True), ((word + 1) / 2**32, False)):
            y = implementation(torch.ones(1, 4), ids, p=p, seed=0, site=0, offset=0)
            assert bool(y[0, lane] != 0) is kept


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (2, 3, 7), (1, 257), (5, 1023), (2, 20000), (0, 4), (3, 0), (4,)])
@pytest.mark.parametrize("offset", [0, 1, 3, 258, 2**33 + 5])
def test_kernel_equals_reference_bitwise(dtype, shape, offset):
    x = torch.randn(shape).to(dtype)
    ids = torch.randint(0, 2**40, (shape[0],))
    args = (0.3, 2**32 - 1, 77, offset)
    assert_equal(torch.ops.megagpt.dropout(x, ids, *args), _reference(x, ids, *args))


@needs_kernel
@pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.5, 0.999])
def test_kernel_equals_reference_for_any_p(p):
    x, ids = torch.randn(3, 4097), torch.arange(3)
    assert_equal(torch.ops.megagpt.dropout(x, ids, p, 1, 2, 9), _reference(x, ids, p, 1, 2, 9))


@pytest.mark.parametrize("implementation", [dropout, _reference])
def test_non_contiguous_input_gives_the_same_values(implementation):
    x = torch.randn(6, 5, 4).transpose(0, 2)[::2]
    ids = torch.arange(8)[::4]
    assert not x.is_contiguous()
    settings = {"p": 0.4, "seed": 1, "site": 2, "offset": 3}
    assert_equal(implementation(x, ids, **settings), implementation(x.contiguous(), ids.contiguous(), **settings))


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


def test_opcheck():
    for x in (torch.randn(2, 3, requires_grad=True), torch.randn(3, 2).t(), torch.randn(2, 5).bfloat16()):
        torch.library.opcheck(torch.ops.megagpt.dropout.default, (x, torch.arange(2), 0.5, 1, 2, 3))


def test_gradcheck():
    ids = torch.tensor([4, 9])
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dropout(x, ids, p=0.4, seed=1, site=2, offset=6), x)
    assert torch.autograd.gradgradcheck(lambda x: dropout(x, ids, p=0.4, seed=1, site=2, offset=6), x)


def test_compiles_without_graph_breaks():
    def function(x: Tensor, ids: Tensor) -> Tensor:
        return dropout(x * 2, ids, p=0.3, seed=4, site=5).sin()

    x = torch.randn(2, 33, requires_grad=True)
    ids = torch.tensor([1, 8])
    y = function(x, ids)
    y_compiled = torch.compile(function, fullgraph=True)(x, ids)
    torch.testing.assert_close(y_compiled, y)
    torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in (y_compiled, y)))


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


@needs_kernel
def test_status_names_the_kernel():
    assert kernel_status("dropout", "cpu") == "cpu kernel"
    if "CUDA" not in torch.__config__.show():
        assert kernel_status("dropout", "cuda").startswith("reference (")
