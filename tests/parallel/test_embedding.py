"""The vocabulary-parallel embedding and logits against torch.nn, on vocabularies that no axis divides."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.inventory.parameter import Init, Parameter
from megagpt.parallel.axis import Axis
from megagpt.parallel.embedding import VocabParallelEmbedding, vocab_parallel_logits
from megagpt.parallel.mesh import build_mesh
from megagpt.parallel.parameter import Declared, part_of
from megagpt.processes.local import run_ranks
from tests.logical import Parts, assemble, filled, gradient_parts
from tests.tolerances import assert_close, assert_equal

D_MODEL, PAD_TO = 6, 8


def declared(vocab_size: int) -> Declared:
    table = Parameter((vocab_size, D_MODEL), "table", Init("normal"), sharded=0, pad_to=PAD_TO)
    return Declared("tokens", {"weight": table})


def embed(weight: Tensor, tokens_BT: Tensor, dx_BTD: Tensor) -> tuple[Tensor, Parts]:
    axis = build_mesh("cpu", pp=1, dp=1, tp=torch.distributed.get_world_size()).model
    layer = VocabParallelEmbedding(declared(len(weight)), axis)
    filled(layer, {"weight": weight})
    x_BTD = layer(tokens_BT)
    x_BTD.backward(dx_BTD)
    return x_BTD.detach(), gradient_parts(layer.named_parameters())


def score(weight: Tensor, x_BTD: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Parts]:
    axis = build_mesh("cpu", pp=1, dp=1, tp=torch.distributed.get_world_size()).model
    layer = VocabParallelEmbedding(declared(len(weight)), axis)
    filled(layer, {"weight": weight})
    x_BTD = x_BTD.clone().requires_grad_()
    part = part_of(layer.weight)
    logits_BTV = vocab_parallel_logits(x_BTD, layer.weight, axis)[..., : part.length]
    logits_BTV.backward(dy.narrow(-1, part.start, part.length))
    assert x_BTD.grad is not None
    return logits_BTV.detach(), x_BTD.grad, gradient_parts(layer.named_parameters())


# 5 on 4 ranks: chunks of 2, 2, 1 and 0 rows.
@pytest.mark.parametrize(("vocab_size", "tp"), [(211, 1), (211, 2), (211, 4), (256, 2), (5, 4)])
def test_embedding_equals_nn_embedding(vocab_size, tp):
    reference = nn.Embedding(vocab_size, D_MODEL, dtype=torch.float64)
    tokens_BT = torch.cat([torch.arange(vocab_size), torch.randint(0, vocab_size, (vocab_size,))]).view(2, -1)
    x_ref = reference(tokens_BT)
    dx_BTD = torch.randn_like(x_ref)
    x_ref.backward(dx_BTD)

    outputs, grads = zip(*run_ranks(embed, tp, reference.weight.detach(), tokens_BT, dx_BTD), strict=True)

    for x_BTD in outputs:
        assert_equal(x_BTD, x_ref.detach())  # a sum of one number and zeros: exact
    assert_close(assemble(grads)["weight"], reference.weight.grad)


@pytest.mark.parametrize(("vocab_size", "tp"), [(211, 1), (211, 2), (211, 4), (5, 4)])
def test_logits_equal_a_linear_layer(vocab_size, tp):
    weight = torch.randn(vocab_size, D_MODEL, dtype=torch.float64, requires_grad=True)
    x_BTD = torch.randn(2, 3, D_MODEL, dtype=torch.float64, requires_grad=True)
    y_ref = F.linear(x_BTD, weight)
    dy = torch.randn_like(y_ref)
    y_ref.backward(dy)

    results = run_ranks(score, tp, weight.detach(), x_BTD.detach(), dy)

    outputs, x_grads, grads = zip(*results, strict=True)
    assert_close(torch.cat(outputs, dim=-1), y_ref.detach(), "logits")
    for x_grad in x_grads:
        assert_close(x_grad, x_BTD.grad, "input gradient")
    assert_close(assemble(grads)["weight"], weight.grad, "weight gradient")


def test_local_rows_are_aligned_and_padding_is_zero():
    for rank in range(4):
        weight = VocabParallelEmbedding(declared(211), Axis(group=None, rank=rank, size=4)).weight
        part = part_of(weight)
        assert weight.shape[0] % PAD_TO == 0
        assert weight[: part.length].count_nonzero() == part.length * D_MODEL
        assert weight[part.length :].count_nonzero() == 0
