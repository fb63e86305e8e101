"""Vocabulary-parallel cross-entropy against torch's, and what it sends."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagpt.inventory.parameter import ZEROS, Parameter
from megagpt.model.loss import vocab_parallel_cross_entropy
from megagpt.ops import cross_entropy as op_module
from megagpt.ops.library import MISSING_KERNELS
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.mesh import build_mesh
from megagpt.parallel.parameter import Part, held
from megagpt.processes.local import run_ranks
from tests.tolerances import assert_close, assert_equal

needs_kernels = pytest.mark.skipif(MISSING_KERNELS is not None, reason=f"no compiled kernels: {MISSING_KERNELS}")
KERNELS = ["reference", pytest.param("cpu", marks=needs_kernels)]
SETTINGS = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.2, "z_loss": 1e-2, "in_place": True},
]


def part_on(axis: Axis, vocab_size: int) -> tuple[Part, int]:
    """The rows of the output matrix that a rank holds, and how many it has with padding."""
    declared = Parameter((vocab_size,), "vector", ZEROS, sharded=0, pad_to=8)
    return held(declared, axis), declared.local_size(axis.size)


def local_loss(
    logits_BTV: Tensor, labels_BT: Tensor, weights_BT: Tensor, settings: dict
) -> tuple[Tensor, Tensor, list[int]]:
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
    loss_BT = vocab_parallel_cross_entropy(local_BTV, labels_BT, part, axis, **settings)
    loss_BT.backward(weights_BT.to(loss_BT.dtype))
    assert local_BTV.grad is not None
    assert local_BTV.grad[..., part.length :].count_nonzero() == 0, "padding has a gradient"
    return loss_BT.detach(), local_BTV.grad[..., : part.length], sent


def reference(
    logits_BTV: Tensor, labels_BT: Tensor, weights_BT: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Losses and gradient of the logits by torch, in float64."""
    logits_BTV = logits_BTV.clone().double().requires_grad_()
    logits_NV, labels_N = logits_BTV.flatten(0, 1), labels_BT.flatten()
    loss_N = F.cross_entropy(logits_NV, labels_N, reduction="none", label_smoothing=label_smoothing)
    loss_BT = (loss_N + z_loss * logits_NV.logsumexp(-1).square()).view_as(labels_BT)
    loss_BT.backward(weights_BT)
    assert logits_BTV.grad is not None
    return loss_BT.detach(), logits_BTV.grad


def require_torchs(logits_BTV: Tensor, labels_BT: Tensor, tp: int, settings: dict) -> None:
    """tp ranks' losses and gradients are those of torch, and three numbers a token are all that is sent."""
    weights_BT = torch.randn(labels_BT.shape, dtype=torch.float64)
    torchs = {k: v for k, v in settings.items() if k in ("label_smoothing", "z_loss")}
    loss_ref, grad_ref = reference(logits_BTV, labels_BT, weights_BT, **torchs)
    results = run_ranks(local_loss, tp, logits_BTV, labels_BT, weights_BT, settings)
    dtype = logits_BTV.dtype
    for loss_BT, _, sent in results:
        assert loss_BT.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_equal(loss_BT, results[0][0], "ranks")
        assert_close(loss_BT, loss_ref, "losses")
        assert sent == ([] if tp == 1 else [labels_BT.numel(), 3 * labels_BT.numel()])  # never the logits
    assert_close(torch.cat([grad for _, grad, _ in results], dim=-1), grad_ref, "gradient", dtype)


def tokens(vocab_size: int, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    logits_BTV = (torch.randn(3, 7, vocab_size, dtype=torch.float64) * scale).to(dtype)
    labels_BT = torch.randint(0, vocab_size, (3, 7))
    labels_BT[0, :2] = torch.tensor([0, vocab_size - 1])
    return logits_BTV, labels_BT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "tp"), [(211, 1), (211, 2), (211, 4), (5, 4)])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_equals_torch(vocab_size, tp, dtype, scale):
    require_torchs(*tokens(vocab_size, scale, dtype), tp, {})


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(settings) or "plain")
@pytest.mark.parametrize(("vocab_size", "tp"), [(211, 1), (211, 2), (5, 4)])
def test_settings_equal_torchs(vocab_size, tp, settings, kernels):
    require_torchs(*tokens(vocab_size, 3.0, torch.float32), tp, settings | {"kernels": kernels})


def test_a_rank_whose_tokens_are_all_masked():
    logits_BTV, labels_BT = tokens(64, 1.0, torch.float32)
    logits_BTV[..., :32] = -torch.inf
    require_torchs(logits_BTV, labels_BT % 32 + 32, 2, {})


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
        monkeypatch.setattr(op_module, "_chunks", lambda _, step=step: step)
        nll = vocab_parallel_cross_entropy(logits, labels, part, SINGLE, kernels="reference")
        results.append((nll.detach(), torch.autograd.grad(nll.sum(), logits)[0]))
    for nll, grad in results[1:]:
        assert_equal(nll, results[0][0])
        assert_equal(grad, results[0][1])


def test_chunks_cover_all_rows_once():
    logits = torch.empty(50, 200_000, device="meta")
    chunks = list(op_module._chunks(logits))
    assert len(chunks) > 1
    assert [i for rows in chunks for i in range(50)[rows]] == list(range(50))


@pytest.mark.parametrize("kernels", KERNELS)
def test_logits_and_gradient_are_left_alone(kernels):
    logits, labels = torch.randn(2, 3, 8, requires_grad=True), torch.randint(0, 5, (2, 3))
    before = logits.detach().clone()
    part, _ = part_on(SINGLE, 5)
    nll = vocab_parallel_cross_entropy(logits, labels, part, SINGLE, kernels=kernels).sum()
    grads = [torch.autograd.grad(nll, logits, retain_graph=True)[0] for _ in range(2)]
    assert_equal(logits.detach(), before)
    assert_equal(grads[0], grads[1])


@pytest.mark.parametrize("kernels", KERNELS)
def test_in_place_the_gradient_takes_the_place_of_the_logits(kernels):
    leaf, labels = torch.randn(2, 3, 8, requires_grad=True), torch.randint(0, 5, (2, 3))
    part, _ = part_on(SINGLE, 5)
    wanted = torch.autograd.grad(vocab_parallel_cross_entropy(leaf, labels, part, SINGLE).sum(), leaf)[0]
    logits = leaf.clone()
    other_user = logits.square().sum()
    nll = vocab_parallel_cross_entropy(logits, labels, part, SINGLE, in_place=True, kernels=kernels).sum()
    grad = torch.autograd.grad(nll, logits, retain_graph=True)[0]
    assert grad.data_ptr() == logits.data_ptr()
    assert_close(grad, wanted)
    with pytest.raises(RuntimeError, match="second backward pass"):
        torch.autograd.grad(nll, logits)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(other_user, leaf)


@pytest.mark.parametrize("way", [{}, {"in_place": True}], ids=str)
def test_a_plain_value_has_the_gradient_of_the_whole(way):
    leaf, labels = torch.randn(2, 3, 8, requires_grad=True), torch.randint(0, 5, (2, 3))
    part, _ = part_on(SINGLE, 5)
    terms = {"label_smoothing": 0.2, "z_loss": 0.1}
    whole = vocab_parallel_cross_entropy(leaf, labels, part, SINGLE, **terms)
    (wanted,) = torch.autograd.grad(whole.sum(), leaf)
    plain = vocab_parallel_cross_entropy(leaf, labels, part, SINGLE)
    assert (whole - plain).abs().min() > 1e-3
    logits = leaf.clone()
    shown = vocab_parallel_cross_entropy(logits, labels, part, SINGLE, plain_value=True, **terms, **way)
    assert_close(shown, plain)
    assert_close(torch.autograd.grad(shown.sum(), logits)[0], wanted)


@needs_kernels
def test_without_gradients_the_logits_are_left_alone():
    logits, labels = torch.randn(3, 4, 8, requires_grad=True), torch.randint(0, 5, (3, 4))
    before = logits.detach().clone()
    part, _ = part_on(SINGLE, 5)
    with torch.no_grad():
        vocab_parallel_cross_entropy(logits, labels, part, SINGLE, in_place=True)
    vocab_parallel_cross_entropy(logits.detach(), labels, part, SINGLE, in_place=True)
    assert_equal(logits.detach(), before)


@pytest.mark.parametrize(
    ("labels", "settings", "wanted"),
    [
        (torch.zeros(3, dtype=torch.int64), {}, r"labels \(3,\), wanted \(N, V\) and \(N\)"),
        (torch.zeros(2, dtype=torch.int32), {}, r"labels of torch.int32, wanted torch.int64"),
        (torch.zeros(2, dtype=torch.int64), {"n_valid": 6}, "n_valid=6, wanted 0 to 5"),
        (torch.zeros(2, dtype=torch.int64), {"label_smoothing": 1.5}, "label_smoothing=1.5, wanted 0 to 1"),
        (torch.zeros(2, dtype=torch.int64), {"combine": lambda s: s}, "combine without vocab"),
    ],
)
def test_what_does_not_fit_is_refused(labels, settings, wanted):
    with pytest.raises(ValueError, match=wanted):
        op_module.cross_entropy(torch.randn(2, 5), labels, **settings)


def test_gradcheck():
    part, n_columns = part_on(SINGLE, 5)
    logits = torch.randn(2, 3, n_columns, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 3))
    assert torch.autograd.gradcheck(lambda x: vocab_parallel_cross_entropy(x, labels, part, SINGLE), logits)
