"""Logits, loss and every gradient of transformers' GPT-2, from the same weights, on every kind of layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megagpt.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megagpt.data.loader import MicroBatch
from megagpt.engine.engine import Engine
from megagpt.engine.stages import GPTStage
from megagpt.model.gpt import GPT, Embedding, Head, layer_list
from megagpt.model.hf import from_hf, hf_config, load_logical
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.local import run_ranks
from megagpt.parallel.mesh import build_mesh
from megagpt.parallel.parameter import Part, part_of
from megagpt.plan.plan import make_plan
from tests.logical import Parts, assemble, gradient_parts
from tests.tolerances import TOLERANCES, assert_close

# A vocabulary that no axis divides, and a sequence shorter than the context.
TIED = ModelConfig(n_layers=2, d_model=32, n_heads=4, seq_len=16, vocab_size=211)
UNTIED = replace(TIED, tied_embeddings=False, d_ff=48, activation="gelu", norm_eps=1e-3)
T = 11


@dataclass(frozen=True)
class Batch:
    """Tokens, and for each the next one."""

    tokens_BT: Tensor  # noqa: N815
    labels_BT: Tensor  # noqa: N815


@dataclass(frozen=True)
class Result:
    """What a process holds after forward and backward: its columns of the logits (None: not the last stage)."""

    loss: Tensor | None
    logits_BTV: Tensor | None  # noqa: N815
    grads: Parts


@dataclass(frozen=True)
class Reference:
    """What transformers computes; weights and gradients are logical tensors under our names."""

    weights: dict[str, Tensor]
    loss: Tensor
    logits_BTV: Tensor  # noqa: N815
    grads: dict[str, Tensor]


def random_batch() -> Batch:
    tokens_BT = torch.randint(0, TIED.vocab, (3, T + 1))
    return Batch(tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous())


def transformers_gpt2(config: ModelConfig, batch: Batch, dtype: torch.dtype, attention: str = "eager") -> Reference:
    import transformers  # only in the parent: two seconds in every rank otherwise

    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(config), attn_implementation=attention))
    model.eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains too must matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = model(input_ids=batch.tokens_BT)
    loss = F.cross_entropy(output.logits.flatten(0, 1), batch.labels_BT.flatten())
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    return Reference(from_hf(weights, config), loss.detach(), output.logits.detach(), from_hf(grads, config))


def compare(results: list[Result], reference: Reference, dtype: torch.dtype) -> None:
    """Every process's results against the reference."""
    losses = [r.loss for r in results if r.loss is not None]
    assert losses
    for loss in losses:
        assert_close(loss, reference.loss, "loss", dtype)
    columns = [r.logits_BTV for r in results if r.logits_BTV is not None]
    if columns:
        assert_close(torch.cat(columns, dim=-1), reference.logits_BTV, "logits", dtype)
    grads = assemble(r.grads for r in results)
    assert grads.keys() == reference.grads.keys()
    for name, expected in reference.grads.items():
        assert_close(grads[name], expected, f"gradient of {name}", dtype)


def whole_columns(logits_BTV: Tensor, part: Part) -> Tensor:
    return logits_BTV.detach()[..., : part.length].clone()


def whole_model(config: ModelConfig, weights: dict[str, Tensor], batch: Batch, axis: Axis = SINGLE) -> Result:
    """One stage: the GPT module."""
    model = GPT(config, axis, seed=1).to(weights["head.norm.weight"].dtype)
    load_logical(model.named_parameters(), weights)
    logits_BTV = model(batch.tokens_BT)
    loss = model(batch.tokens_BT, labels_BT=batch.labels_BT)
    loss.backward()
    columns = whole_columns(logits_BTV, part_of(model.head.tokens.weight))
    return Result(loss.detach(), columns, gradient_parts(model.named_parameters()))


def tensor_parallel(config: ModelConfig, weights: dict[str, Tensor], batch: Batch) -> Result:
    """All ranks on the model axis."""
    axis = build_mesh("cpu", pp=1, dp=1, tp=dist.get_world_size()).model
    return whole_model(config, weights, batch, axis)


def stages_by_hand(config: ModelConfig, weights: dict[str, Tensor], batch: Batch) -> Result:
    """Two pipeline stages of the layer list; activations and gradients are sent here, without an engine."""
    mesh = build_mesh("cpu", pp=2, dp=1, tp=dist.get_world_size() // 2)
    pipe = mesh.pipe
    layers = layer_list(config, mesh.model, seed=1)
    half = len(layers) // 2
    mine = layers[:half] if pipe.rank == 0 else layers[half:]
    modules = [layer.kind(*layer.arguments).to(weights["head.norm.weight"].dtype) for layer in mine]
    parameters = stage_parameters([layer.name for layer in mine], modules, config)
    load_logical(parameters, weights, whole_model=False)
    ids_B = torch.zeros(len(batch.tokens_BT), dtype=torch.int64)
    x_BTD = torch.empty(*batch.tokens_BT.shape, config.d_model, dtype=weights["head.norm.weight"].dtype)
    loss = columns = None
    if pipe.rank == 0:
        x = (batch.tokens_BT, ids_B)
        for module in modules:
            x = module(x)
        dist.send(x[0].detach(), group=pipe.group, group_dst=1)
        dist.recv(x_BTD, group=pipe.group, group_src=1)
        x[0].backward(x_BTD)
    else:
        dist.recv(x_BTD, group=pipe.group, group_src=0)
        x = (x_BTD.requires_grad_(), ids_B)
        for module in modules:
            x = module(x)
        head = modules[-1]
        assert isinstance(head, Head)
        columns = whole_columns(x, part_of(head.tokens.weight))
        loss = head.loss(x, batch.labels_BT)
        loss.backward()
        dist.send(x_BTD.grad, group=pipe.group, group_dst=0)
        loss = loss.detach()
    if config.tied_embeddings:
        tied = modules[0 if pipe.rank == 0 else -1]
        assert isinstance(tied, (Embedding, Head)) and tied.tokens.weight.grad is not None
        dist.all_reduce(tied.tokens.weight.grad, group=pipe.group)
    grads = gradient_parts(parameters)
    if config.tied_embeddings and pipe.rank == 1:
        del grads["embedding.tokens.weight"]  # the first stage reports the sum
    return Result(loss, columns, grads)


def stage_parameters(names: list[str], modules: list[nn.Module], config: ModelConfig) -> list[tuple[str, nn.Parameter]]:
    """A stage's parameters under canonical names; the head's copy of a tied weight under that of the original."""
    found = [
        (f"{n}.{p}", parameter) for n, m in zip(names, modules, strict=True) for p, parameter in m.named_parameters()
    ]
    if config.tied_embeddings:
        found = [(n.replace("head.tokens", "embedding.tokens"), parameter) for n, parameter in found]
    return found


def stages_by_engine(config: ModelConfig, weights: dict[str, Tensor], batch: Batch) -> Result:
    """Two pipeline stages in DeepSpeed's engine, one micro-batch a sample; gradients as the optimizer sees them."""
    tp, samples = dist.get_world_size() // 2, len(batch.tokens_BT)
    run = RunConfig(
        model=config,
        parallel=ParallelConfig(tp=tp, pp=2, zero_stage=0),
        optim=OptimConfig(clip=0.0),
        train=TrainConfig(micro_batch_size=1, global_batch_size=samples),
    )
    mesh = build_mesh("cpu", pp=2, dp=1, tp=tp)
    engine = Engine(run, make_plan(run, dist.get_world_size()), mesh)
    stage = engine.module
    assert isinstance(stage, GPTStage)
    named = stage.canonical_parameters()
    load_logical([(n.name, n.parameter) for n in named], weights, whole_model=False)
    grads: Parts = {}

    def look(*_) -> None:
        grads.update(gradient_parts((n.name, n.parameter) for n in named if n.owned))

    engine.base_optimizer.register_step_pre_hook(look)
    ids_B = torch.arange(samples)
    rows = [slice(i, i + 1) for i in range(samples)]
    step = engine.train_step(0, [MicroBatch(batch.tokens_BT[r], batch.labels_BT[r], ids_B[r]) for r in rows])
    return Result(torch.tensor(step.loss), None, {name: (part, grad.clone()) for name, (part, grad) in grads.items()})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
def test_one_process(config, attention, dtype):
    batch = random_batch()
    reference = transformers_gpt2(config, batch, dtype, attention)
    compare([whole_model(config, reference.weights, batch)], reference, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize(
    ("function", "n_ranks"),
    [(tensor_parallel, 2), (tensor_parallel, 4), (stages_by_hand, 2), (stages_by_hand, 4)],
    ids=["tp2", "tp4", "pp2", "tp2-pp2"],
)
def test_several_processes(function: Callable[..., Result], n_ranks, config, dtype):
    batch = random_batch()
    reference = transformers_gpt2(config, batch, dtype)
    compare(run_ranks(function, n_ranks, config, reference.weights, batch), reference, dtype)


@pytest.mark.parametrize("config", [TIED, UNTIED], ids=["tied", "untied"])
@pytest.mark.parametrize("n_ranks", [2, 4], ids=["pp2", "tp2-pp2"])
def test_pipeline_engine(n_ranks, config):
    batch = random_batch()
    reference = transformers_gpt2(config, batch, torch.float32)
    compare(run_ranks(stages_by_engine, n_ranks, config, reference.weights, batch), reference, torch.float32)


def test_loss_is_that_of_transformers_own_labels():
    import transformers

    tokens_BT = torch.randint(0, TIED.vocab, (2, T))
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(TIED))).eval()
    ours = GPT(TIED, SINGLE)
    load_logical(ours.named_parameters(), from_hf(theirs.state_dict(), TIED))
    loss = ours(tokens_BT[:, :-1], labels_BT=tokens_BT[:, 1:])
    assert loss.item() == pytest.approx(theirs(tokens_BT, labels=tokens_BT).loss.item(), rel=TOLERANCES[torch.float32])
