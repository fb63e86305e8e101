"""Logits, loss and every gradient of transformers' own models, from the same weights, on every kind of layout.

All architectures go through one start of ranks per layout, which costs more than the models do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load, save
from torch import Tensor, nn

from megagpt.config import ModelConfig, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from megagpt.data.loader import MicroBatch
from megagpt.model.gpt import GPT, Embedding, Head, layer_list
from megagpt.model.stream import Stream
from megagpt.parallel.axis import SINGLE, Axis
from megagpt.parallel.mesh import Mesh, build_mesh
from megagpt.parallel.parameter import Part, part_of
from megagpt.plan.plan import make_plan
from megagpt.processes.local import run_ranks
from megagpt.train.step.engine import Engine
from tests.hf.hf_cases import CASES, Case, state_of, theirs
from tests.hf.load import from_hf, load_logical
from tests.logical import Parts, assemble, gradient_parts
from tests.tolerances import TOLERANCES, assert_close

T = 11  # shorter than the context, longer than the window
EXACT = ("gpt2", "gpt2 untied", "gpt1")  # the others compute a softmax or angles in fp32, whatever the weights are
ENGINE = ("gpt2", "gptj", "bloom", "mistral")


@dataclass(frozen=True)
class Work:
    """A model with weights, and what it is to compute: tokens, and for each the next one.

    Weights and gradients travel as safetensors: on the way to a rank and back, each tensor would take a file
    descriptor, and all architectures have more tensors than a message may have of these.
    """

    config: ModelConfig
    weights: bytes
    tokens_BT: Tensor  # noqa: N815
    labels_BT: Tensor  # noqa: N815
    dtype: torch.dtype


@dataclass(frozen=True)
class Result:
    """What a process holds after forward and backward: its columns of the logits (None: not the last stage)."""

    loss: Tensor | None
    logits_BTV: Tensor | None  # noqa: N815
    parts: dict[str, Part]
    grads: bytes

    @staticmethod
    def of(loss: Tensor | None, logits_BTV: Tensor | None, grads: Parts) -> Result:
        packed = save({name: grad.contiguous() for name, (_, grad) in grads.items()})
        return Result(loss, logits_BTV, {name: part for name, (part, _) in grads.items()}, packed)


@dataclass(frozen=True)
class Reference:
    """What transformers computes; weights and gradients are logical tensors under our names."""

    work: Work
    loss: Tensor
    logits_BTV: Tensor  # noqa: N815
    grads: dict[str, Tensor]


def reference_of(case: Case, dtype: torch.dtype = torch.float32) -> Reference:
    model, config = theirs(case, attn_implementation="eager").to(dtype), case.config
    tokens_BT = torch.randint(0, config.vocab, (3, T + 1))
    inputs_BT, labels_BT = tokens_BT[:, :-1].contiguous(), tokens_BT[:, 1:].contiguous()
    logits_BTV = model(input_ids=inputs_BT).logits
    loss = F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten())
    loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(grads) == len(list(model.parameters()))
    weights, grads = (from_hf(named, config, case.architecture) for named in (state_of(model), grads))
    return Reference(
        Work(config, save(weights), inputs_BT, labels_BT, dtype), loss.detach(), logits_BTV.detach(), grads
    )


def compare(results: list[Result], reference: Reference, case: str) -> None:
    """Every process's results against the reference."""
    dtype = reference.work.dtype
    losses = [r.loss for r in results if r.loss is not None]
    assert losses
    for loss in losses:
        assert_close(loss, reference.loss, f"{case}: loss", dtype)
    columns = [r.logits_BTV for r in results if r.logits_BTV is not None]
    if columns:
        assert_close(torch.cat(columns, dim=-1), reference.logits_BTV, f"{case}: logits", dtype)
    unpacked = [(r.parts, load(r.grads)) for r in results]
    grads = assemble({name: (parts[name], grad) for name, grad in grads.items()} for parts, grads in unpacked)
    assert grads.keys() == reference.grads.keys()
    for name, expected in reference.grads.items():
        assert_close(grads[name], expected, f"{case}: gradient of {name}", dtype)


def whole_columns(logits_BTV: Tensor, part: Part) -> Tensor:
    return logits_BTV.detach()[..., : part.length].clone()


def whole_model(work: Work, axis: Axis = SINGLE) -> Result:
    """One stage: the GPT module."""
    model = GPT(work.config, axis, seed=1).to(work.dtype)
    load_logical(model.named_parameters(), load(work.weights))
    logits_BTV = model(work.tokens_BT)
    loss = model(work.tokens_BT, labels_BT=work.labels_BT)
    loss.backward()
    columns = whole_columns(logits_BTV, part_of(model.head.tokens.weight))
    return Result.of(loss.detach(), columns, gradient_parts(model.named_parameters()))


def tensor_parallel(works: Mapping[str, Work]) -> dict[str, Result]:
    """All ranks on the model axis."""
    axis = build_mesh("cpu", pp=1, dp=1, tp=dist.get_world_size()).model
    return {name: whole_model(work, axis) for name, work in works.items()}


def stages_by_hand(works: Mapping[str, Work]) -> dict[str, Result]:
    """Two pipeline stages of the layer list."""
    mesh = build_mesh("cpu", pp=2, dp=1, tp=dist.get_world_size() // 2)
    return {name: one_stage(work, mesh) for name, work in works.items()}


def one_stage(work: Work, mesh: Mesh) -> Result:
    """This rank's stage; activations and gradients are sent here, without an engine."""
    pipe, config = mesh.pipe, work.config
    layers = layer_list(config, mesh.model, seed=1)
    half = len(layers) // 2
    mine = layers[:half] if pipe.rank == 0 else layers[half:]
    modules = [layer.kind(*layer.arguments).to(work.dtype) for layer in mine]
    parameters = stage_parameters([layer.name for layer in mine], modules, config)
    load_logical(parameters, load(work.weights))
    ids_B = torch.zeros(len(work.tokens_BT), dtype=torch.int64)
    x_BTD = torch.empty(*work.tokens_BT.shape, config.d_model, dtype=work.dtype)
    loss = columns = None
    if pipe.rank == 0:
        stream = Stream(work.tokens_BT, ids_B)
        for module in modules:
            stream = module(stream)
        dist.send(stream.x.detach(), group=pipe.group, group_dst=1)
        dist.recv(x_BTD, group=pipe.group, group_src=1)
        stream.x.backward(x_BTD)
    else:
        dist.recv(x_BTD, group=pipe.group, group_src=0)
        stream = Stream(x_BTD.requires_grad_(), ids_B)
        *blocks, head = modules
        assert isinstance(head, Head)
        for module in blocks:
            stream = module(stream)
        logits_BTV = head(stream)
        columns = whole_columns(logits_BTV, part_of(head.tokens.weight))
        loss = head.loss(logits_BTV, work.labels_BT)
        loss.backward()
        assert x_BTD.grad is not None
        dist.send(x_BTD.grad, group=pipe.group, group_dst=0)
        loss = loss.detach()
    if config.tied_embeddings:
        tied = modules[0 if pipe.rank == 0 else -1]
        assert isinstance(tied, (Embedding, Head)) and tied.tokens.weight.grad is not None
        dist.all_reduce(tied.tokens.weight.grad, group=pipe.group)
    grads = gradient_parts(parameters)
    if config.tied_embeddings and pipe.rank == 1:
        del grads["embedding.tokens.weight"]  # the first stage reports the sum
    return Result.of(loss, columns, grads)


def stage_parameters(names: list[str], modules: list[nn.Module], config: ModelConfig) -> list[tuple[str, nn.Parameter]]:
    """A stage's parameters under canonical names; the head's copy of a tied weight under that of the original."""
    found = [
        (f"{n}.{p}", parameter) for n, m in zip(names, modules, strict=True) for p, parameter in m.named_parameters()
    ]
    if config.tied_embeddings:
        found = [(n.replace("head.tokens", "embedding.tokens"), parameter) for n, parameter in found]
    return found


def stages_by_engine(work: Work) -> Result:
    """Two pipeline stages in DeepSpeed's engine, one micro-batch a sample; gradients as the optimizer sees them."""
    tp, samples = dist.get_world_size() // 2, len(work.tokens_BT)
    run = RunConfig(
        model=work.config,
        parallel=ParallelConfig(tp=tp, pp=2, zero_stage=0),
        optim=OptimConfig(clip=0.0),
        train=TrainConfig(micro_batch_size=1, global_batch_size=samples),
    )
    mesh = build_mesh("cpu", pp=2, dp=1, tp=tp)
    engine = Engine(run, make_plan(run, dist.get_world_size()), mesh)
    named = engine.parameters
    load_logical([(n.name, n.parameter) for n in named], load(work.weights))
    grads: Parts = {}

    def look(*_) -> None:
        now = gradient_parts((n.name, n.parameter) for n in named if n.owned)
        grads.update({name: (part, grad.clone()) for name, (part, grad) in now.items()})

    engine.backend.optimizer.register_step_pre_hook(look)
    ids_B = torch.arange(samples)
    rows = [slice(i, i + 1) for i in range(samples)]
    step = engine.train_step(0, [MicroBatch(work.tokens_BT[r], work.labels_BT[r], ids_B[r]) for r in rows])
    return Result.of(torch.tensor(step.loss), None, grads)


@pytest.mark.parametrize("name", CASES)
def test_one_process(name):
    reference = reference_of(CASES[name])
    compare([whole_model(reference.work)], reference, name)


@pytest.mark.parametrize("name", EXACT)
def test_one_process_in_float64(name):
    reference = reference_of(CASES[name], torch.float64)
    compare([whole_model(reference.work)], reference, name)


@pytest.mark.parametrize(
    ("function", "n_ranks"),
    [(tensor_parallel, 4), (stages_by_hand, 4)],
    ids=["tp4", "tp2-pp2"],
)
def test_several_processes(function: Callable[..., dict[str, Result]], n_ranks):
    fits = n_ranks if function is tensor_parallel else n_ranks // 2
    references = {
        (name, dtype): reference_of(case, dtype)
        for name, case in CASES.items()
        if case.config.n_heads % fits == 0
        for dtype in ((torch.float32, torch.float64) if name in EXACT else (torch.float32,))
    }
    ranks = run_ranks(function, n_ranks, {key: reference.work for key, reference in references.items()})
    for key, reference in references.items():
        compare([results[key] for results in ranks], reference, f"{key[0]}, {key[1]}")


@pytest.mark.parametrize("name", ENGINE)
def test_pipeline_engine(name):
    reference = reference_of(CASES[name])
    compare(run_ranks(stages_by_engine, 4, reference.work), reference, name)


def test_loss_is_that_of_transformers_own_labels():
    config = CASES["gpt2"].config
    tokens_BT = torch.randint(0, config.vocab, (2, T))
    model = theirs(CASES["gpt2"])
    ours = GPT(config, SINGLE)
    load_logical(ours.named_parameters(), from_hf(state_of(model), config))
    loss = ours(tokens_BT[:, :-1], labels_BT=tokens_BT[:, 1:])
    assert loss.item() == pytest.approx(model(tokens_BT, labels=tokens_BT).loss.item(), rel=TOLERANCES[torch.float32])


@pytest.mark.parametrize("n_heads", [1, 3, 6, 12, 20])
def test_alibi_of_any_number_of_heads(n_heads):
    for name in ("bloom", "mpt"):
        case = replace(CASES[name], config=replace(CASES[name].config, n_layers=1, d_model=60, n_heads=n_heads))
        reference = reference_of(case)
        compare([whole_model(reference.work)], reference, f"{name} of {n_heads} heads")
