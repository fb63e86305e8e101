"""The model against itself on other layouts, and the properties that its parts promise."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megagpt.config import ModelConfig
from megagpt.config.kernels import AUTO, Kernels
from megagpt.inventory.parameter import Init
from megagpt.model.dropout import Dropout
from megagpt.model.gpt import GPT
from megagpt.model.loss import LossTerms
from megagpt.ops.dropout import dropout
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.embedding import gather_logits
from megagpt.parallel.mesh import build_mesh
from megagpt.parallel.parameter import part_of
from megagpt.processes.local import run_ranks
from tests.logical import Parts, assemble, drawn, gradient_parts
from tests.tolerances import assert_close, assert_equal

PLAIN = ModelConfig(n_layers=2, d_model=32, n_heads=4, seq_len=16, vocab_size=211)
DROPPING = replace(PLAIN, dropout_embedding=0.1, dropout_attention=0.2, dropout_residual=0.3)
WIDE_HEADS = replace(DROPPING, d_head=12, d_ff=40, tied_embeddings=False, position="none")
LLAMA = replace(
    DROPPING, position="rotary", norm="rmsnorm", activation="swiglu", d_ff=40, dropout_attention=0.0, rotary_base=300.0
)
ALIBI = replace(PLAIN, position="alibi", activation="relu2", dropout_residual=0.1)
CONFIGS = {"gpt2": DROPPING, "wide-heads": WIDE_HEADS, "llama": LLAMA, "alibi": ALIBI}
T = 13


def batch(n_samples: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, ids of the samples, labels."""
    tokens_BT = torch.randint(0, PLAIN.vocab, (n_samples, T + 1))
    return tokens_BT[:, :-1], torch.randint(0, 2**40, (n_samples,)), tokens_BT[:, 1:]


def loss_and_gradients(
    config: ModelConfig,
    axis: Axis,
    inputs: tuple[Tensor, Tensor, Tensor],
    dtype: torch.dtype,
    recompute: bool = False,
    kernels: Kernels = AUTO,
) -> tuple[Tensor, Tensor, Parts]:
    model = GPT(config, axis, seed=3, recompute=recompute, kernels=kernels).to(dtype)
    tokens_BT, ids_B, labels_BT = inputs
    logits_BTV = gather_logits(model(tokens_BT, ids_B), config.vocab, axis)
    loss = model(tokens_BT, ids_B, labels_BT)
    loss.backward()
    return loss.detach(), logits_BTV.detach(), gradient_parts(model.named_parameters())


def tensor_parallel(config: ModelConfig, inputs: tuple, dtype: torch.dtype) -> tuple[Tensor, Tensor, Parts]:
    axis = build_mesh("cpu", pp=1, dp=1, tp=dist.get_world_size()).model
    return loss_and_gradients(config, axis, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_tensor_parallel_ranks_compute_the_same_with_dropout(config, tp, dtype):
    inputs = batch()
    loss, logits_BTV, grads = loss_and_gradients(config, SINGLE, inputs, dtype)
    expected = assemble([grads])
    results = run_ranks(tensor_parallel, tp, config, inputs, dtype)
    for rank_loss, rank_logits_BTV, _ in results:
        assert_close(rank_loss, loss, "loss", dtype)
        assert_close(rank_logits_BTV, logits_BTV, "logits")
    for name, grad in assemble(r[2] for r in results).items():
        assert_close(grad, expected[name], f"gradient of {name}")


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("tp", [2, 4])
def test_initial_weights_do_not_depend_on_the_layout(config, tp):
    whole = dict(GPT(config, SINGLE, seed=5).named_parameters())
    ranks = [dict(GPT(config, Axis(group=None, rank=r, size=tp), seed=5).named_parameters()) for r in range(tp)]
    merged = assemble({n: (part_of(p), part_of(p).unpadded(p.detach())) for n, p in rank.items()} for rank in ranks)
    assert merged.keys() == whole.keys()
    for name, tensor in merged.items():
        assert_equal(tensor, part_of(whole[name]).unpadded(whole[name].detach()), name)


def test_a_weight_is_drawn_by_its_own_name():
    for config in (PLAIN, replace(PLAIN, tied_embeddings=False)):
        for name, parameter in GPT(config, SINGLE, seed=5).named_parameters():
            part = part_of(parameter)
            value = part.unpadded(parameter.detach())
            if name.endswith("bias"):
                expected = torch.zeros(part.shape)
            elif "norm" in name:
                expected = torch.ones(part.shape)
            else:
                residual = name.endswith(("attention.out.weight", "mlp.down.weight"))
                std = config.init_std / math.sqrt(2 * config.n_layers) if residual else config.init_std
                expected = drawn(Init("normal", std), part.shape, name, 5)
            assert_equal(value, expected, name)


def test_names_are_those_that_checkpoints_rely_on():
    block = [
        f"{layer}.{kind}"
        for layer in ("norm_1", "attention.qkv", "attention.out", "norm_2", "mlp.up", "mlp.down")
        for kind in ("weight", "bias")
    ]
    expected = ["embedding.positions", "embedding.tokens.weight"]
    expected += [f"blocks.{i}.{name}" for i in range(2) for name in block]
    expected += ["head.norm.weight", "head.norm.bias"]
    assert [name for name, _ in GPT(PLAIN, SINGLE).named_parameters()] == expected
    untied = GPT(replace(PLAIN, tied_embeddings=False), SINGLE)
    assert [name for name, _ in untied.named_parameters()] == [*expected, "head.tokens.weight"]


def test_dropout_sites_are_unique():
    sites = [module.site for module in GPT(DROPPING, SINGLE).modules() if isinstance(module, Dropout)]
    assert len(sites) == 1 + 3 * DROPPING.n_layers
    assert len(set(sites)) == len(sites)


def test_tokens_do_not_see_what_comes_later():
    for config in (PLAIN, replace(PLAIN, dropout_attention=0.1), ALIBI, LLAMA):  # all ways to attend
        model = GPT(config, SINGLE)
        x_BTD = torch.randn(2, T, PLAIN.d_model, requires_grad=True)
        ids_B = torch.arange(2)
        for t in (0, 5, T - 1):
            out = (x_BTD, ids_B)
            for block in model.blocks:
                out = block(out)
            (grad_BTD,) = torch.autograd.grad(model.head(out)[:, t].square().sum(), x_BTD)
            reached_T = grad_BTD.abs().amax(dim=(0, 2)) > 0
            assert reached_T.tolist() == [s <= t for s in range(T)]


def test_attention_with_dropout_equals_flash_attention_where_nothing_is_dropped():
    inputs = batch()
    results = [
        loss_and_gradients(replace(PLAIN, dropout_attention=p), SINGLE, inputs, torch.float64) for p in (0.0, 1e-30)
    ]
    (loss, logits_BTV, grads), (loss_2, logits_2_BTV, grads_2) = results
    assert_close(loss_2, loss)
    assert_close(logits_2_BTV, logits_BTV)
    for name in grads:
        assert_close(grads_2[name][1], grads[name][1], name)


def test_recompute_changes_no_bit():
    inputs = batch()
    plain, recomputed = (
        loss_and_gradients(DROPPING, SINGLE, inputs, torch.float32, recompute) for recompute in (False, True)
    )
    assert_equal(recomputed[0], plain[0])
    assert_equal(recomputed[1], plain[1])
    for name in plain[2]:
        assert_equal(recomputed[2][name][1], plain[2][name][1], name)


def test_recompute_keeps_only_the_inputs_of_blocks():
    def saved_bytes(recompute: bool) -> int:
        model = GPT(PLAIN, SINGLE, recompute=recompute)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        inputs = (torch.randn(2, T, PLAIN.d_model, requires_grad=True), torch.arange(2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            for block in model.blocks:
                inputs = block(inputs)
        return sum(kept.values())

    assert saved_bytes(True) < saved_bytes(False) / 4


def test_masks_follow_the_sample_not_its_place_in_the_batch():
    model = GPT(DROPPING, SINGLE).double()
    tokens_BT, ids_B, _ = batch(4)
    logits_BTV = model(tokens_BT, ids_B)
    order = torch.tensor([2, 0, 3, 1])
    assert_close(model(tokens_BT[order], ids_B[order]), logits_BTV[order])
    assert_close(torch.cat([model(tokens_BT[i : i + 1], ids_B[i : i + 1]) for i in range(4)]), logits_BTV)
    assert (model(tokens_BT, ids_B + 1) - logits_BTV).abs().max() > 1e-3
    assert_equal(model(tokens_BT, ids_B), logits_BTV)


def test_evaluation_drops_nothing():
    tokens_BT, ids_B, labels_BT = batch()
    dropping, plain = GPT(DROPPING, SINGLE).eval(), GPT(PLAIN, SINGLE)
    assert_equal(dropping(tokens_BT, ids_B, labels_BT), plain(tokens_BT, labels_BT=labels_BT))


def test_dropout_module_passes_its_site_and_offset():
    x, ids = torch.randn(2, 8), torch.tensor([3, 4])
    module = Dropout(0.4, seed=9, site=6)
    assert_equal(module(x, ids, offset=5), dropout(x, ids, p=0.4, seed=9, site=6, offset=5))
    assert module.eval()(x, ids) is x
    assert Dropout(0.0, seed=9, site=6)(x, ids) is x


def test_model_without_memory():
    with torch.device("meta"):
        model = GPT(replace(PLAIN, d_model=4096, n_heads=32), SINGLE)
    assert all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_logits_are_what_torch_takes(label_smoothing: float):
    """Without the rows that pad the vocabulary, which would be further classes of logit 0."""
    tokens_BT, _, labels_BT = batch()
    model = GPT(PLAIN, SINGLE)
    logits_BTV = model(tokens_BT)
    assert logits_BTV.shape[-1] == PLAIN.vocab < model.head.tokens.weight.shape[0]
    theirs = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), label_smoothing=label_smoothing)
    terms = LossTerms(label_smoothing=label_smoothing)
    ours = model(tokens_BT, labels_BT=labels_BT, terms=terms)
    if not label_smoothing:  # which moves the gradient, and not the loss that is shown
        assert_close(ours, theirs)
    expected, found = (torch.autograd.grad(loss, list(model.parameters())) for loss in (theirs, ours))
    for a, b in zip(expected, found, strict=True):
        assert_close(a, b)


def test_initial_loss_is_that_of_a_uniform_guess():
    tokens_BT, _, labels_BT = batch()
    loss = GPT(PLAIN, SINGLE)(tokens_BT, labels_BT=labels_BT)
    assert loss.item() == pytest.approx(math.log(PLAIN.vocab), abs=0.1)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_kernels_change_nothing_but_round_off(config):
    inputs = batch()
    (loss, logits_BTV, grads), (loss_2, logits_2_BTV, grads_2) = (
        loss_and_gradients(config, SINGLE, inputs, torch.float32, kernels=Kernels.parse(choice))
        for choice in ("auto", "reference")
    )
    assert_close(loss, loss_2)
    assert_close(logits_BTV, logits_2_BTV)
    for name in grads:
        assert_close(grads[name][1], grads_2[name][1], name)
