"""Vocabulary-parallel cross-entropy against torch's, and what it sends."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagpt.parallel import loss as loss_module
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.local import run_ranks
from megagpt.parallel.loss import vocab_parallel_cross_entropy
from megagpt.parallel.mesh import build_mesh
from megagpt.parallel.parameter import Part, part_of, sharded
from tests.tolerances import assert_close, assert_equal


def part_on(axis: Axis, vocab_size: int) -> tuple[Part, int]:
    """The rows of the output matrix that a rank holds, and how many it has with padding."""
    weight = sharded(torch.zeros(vocab_size, 1), 0, axis, pad_to=8)
    return part_of(weight), len(weight)


def local_nll(logits_BTV: Tensor, labels_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """This rank's losses, gradient of its logits, and the numbers of elements that it sent to be reduced."""
    axis = build_mesh("cpu", pp=1, dp=1, tp=dist.get_world_size()).model
    part, n_columns = part_on(axis, logits_BTV.shape[-1])
    local_BTV = torch.full((*labels_BT.shape, n_columns), 77.0, dtype=logits_BTV.dtype)  # padding may hold anything
    local_BTV[..., : part.length] = part.take(logits_BTV.movedim(-1, 0)).movedim(0, -1)
    local_BTV.requires_grad_()

    sent, dist_all_reduce = [], dist.all_reduce

    def count(tensor: Tensor, **kwargs):
        sent.append(tensor.numel())
        return dist_all_reduce(tensor, **kwargs)

    def refuse(*_, **__):
        raise AssertionError("the loss gathers something")

    dist.all_reduce, dist.all_gather, dist.all_gather_into_tensor = count, refuse, refuse
    nll_BT = vocab_parallel_cross_entropy(local_BTV, labels_BT, part, axis)
    nll_BT.backward(weights_BT.to(nll_BT.dtype))
    assert local_BTV.grad is not None
    assert local_BTV.grad[..., part.length :].count_nonzero() == 0, "padding has a gradient"
    return nll_BT.detach(), local_BTV.grad[..., : part.length], sent


def reference(logits_BTV: Tensor, labels_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and gradient of the logits by torch, in float64."""
    logits_BTV = logits_BTV.clone().double().requires_grad_()
    nll_BT = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), reduction="none").view_as(labels_BT)
    nll_BT.backward(weights_BT)
    assert logits_BTV.grad is not None
    return nll_BT.detach(), logits_BTV.grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "tp"), [(211, 1), (211, 2), (211, 4), (5, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_equals_torch(vocab_size, tp, dtype, scale):
    logits_BTV = (torch.randn(3, 7, vocab_size, dtype=torch.float64) * scale).to(dtype)
    labels_BT = torch.randint(0, vocab_size, (3, 7))
    labels_BT[0, :2] = torch.tensor([0, vocab_size - 1])
    weights_BT = torch.randn(3, 7, dtype=torch.float64)
    nll_ref, grad_ref = reference(logits_BTV, labels_BT, weights_BT)

    results = run_ranks(local_nll, tp, logits_BTV, labels_BT, weights_BT)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for nll_BT, _, sent in results:
        assert nll_BT.dtype == wide
        assert_equal(nll_BT, results[0][0], "ranks")
        assert_close(nll_BT, nll_ref, "losses")
        assert sent == ([] if tp == 1 else [labels_BT.numel()] * 3)  # three numbers a token: never the logits
    assert_close(torch.cat([grad for _, grad, _ in results], dim=-1), grad_ref, "gradient", dtype)


def test_small_probabilities_keep_their_digits_beside_large_logits():
    # The naive logsumexp(x) - x[label] would cancel: at 1e4 a float32 step is 1e-3.
    logits = torch.tensor([[1e4, 1e4 - 12.0, 0.0]])
    part, _ = part_on(SINGLE, 3)
    nll = vocab_parallel_cross_entropy(logits, torch.tensor([0]), part, SINGLE)
    assert nll.item() == pytest.approx(math.exp(-12.0), rel=2e-2)


def test_rows_are_treated_alike_in_any_chunk(monkeypatch):
    logits, labels = torch.randn(11, 5, requires_grad=True), torch.randint(0, 5, (11,))
    part, _ = part_on(SINGLE, 5)
    results = []
    for rows in (11, 4, 1):
        step = [slice(begin, begin + rows) for begin in range(0, 11, rows)]
        monkeypatch.setattr(loss_module, "_chunks", lambda _, step=step: step)
        nll = vocab_parallel_cross_entropy(logits, labels, part, SINGLE)
        results.append((nll.detach(), torch.autograd.grad(nll.sum(), logits)[0]))
    for nll, grad in results[1:]:
        assert_equal(nll, results[0][0])
        assert_equal(grad, results[0][1])


def test_chunks_cover_all_rows_once():
    logits = torch.empty(50, 200_000, device="meta")
    chunks = list(loss_module._chunks(logits))
    assert len(chunks) > 1
    assert [i for rows in chunks for i in range(50)[rows]] == list(range(50))


def test_logits_and_gradient_are_left_alone():
    logits, labels = torch.randn(2, 3, 8, requires_grad=True), torch.randint(0, 5, (2, 3))
    before = logits.detach().clone()
    part, _ = part_on(SINGLE, 5)
    nll = vocab_parallel_cross_entropy(logits, labels, part, SINGLE).sum()
    grads = [torch.autograd.grad(nll, logits, retain_graph=True)[0] for _ in range(2)]
    assert_equal(logits.detach(), before)
    assert_equal(*grads)


def test_gradcheck():
    part, n_columns = part_on(SINGLE, 5)
    logits = torch.randn(2, 3, n_columns, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 3))
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_cross_entropy(x, labels, part, SINGLE), logits)
