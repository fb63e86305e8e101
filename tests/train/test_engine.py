"""The engine against torch and transformers, and what it refuses or finds."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from megagpt.config import ModelConfig, OptimConfig, RunConfig
from megagpt.errors import UserError
from megagpt.hf import hf_config
from megagpt.inventory.parameter import WEIGHT
from megagpt.model.gpt import GPT
from megagpt.optim.build import build_optimizer
from megagpt.parallel.axis import SINGLE
from megagpt.parallel.parameter import named_parameters
from megagpt.processes.agree import RankError
from megagpt.processes.local import run_ranks
from megagpt.schedule import Schedule
from megagpt.train.faults.check_ranks import check_ranks
from tests.hf.load import from_hf
from tests.parity.rank import batches_of, pieces_of, start_engine
from tests.parity.walk import Layout, merge, parity_config, spread_out

MODEL = ModelConfig(n_layers=4, d_model=32, n_heads=4, seq_len=16, vocab_size=211)
STEPS = 5


def config_of(layout: Layout, model: ModelConfig = MODEL, **optim) -> RunConfig:
    config = spread_out(parity_config(model), layout)
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, warmup_steps=2, **optim),
        train=dataclasses.replace(config.train, train_steps=STEPS),
    )


def test_only_matrices_decay():
    model = GPT(MODEL, SINGLE)
    optimizer, _ = build_optimizer(named_parameters(model), RunConfig(model=MODEL, optim=OptimConfig(weight_decay=0.1)))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names.pop(parameter)
            assert group["weight_decay"] == (0.0 if name.endswith("bias") or "norm" in name else 0.1), name
    assert not names  # each parameter is in one group


@dataclasses.dataclass(frozen=True)
class Trained:
    """Per step: loss and gradient norm; and the weights in the end."""

    losses: list[float]
    grad_norms: list[float]
    weights: dict[str, Tensor]


@pytest.fixture(scope="module")
def theirs() -> tuple[dict[str, Tensor], Trained]:
    """transformers' model, torch's AdamW, clipping and schedule, the whole batch at once: first weights, and run."""
    import transformers  # 2 s, and no rank needs it

    config = config_of(Layout(micro_batch_size=8))
    torch.manual_seed(1)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**hf_config(MODEL)))
    first = logical(model)
    optim = config.optim
    decays = {p: not (n.endswith("bias") or "ln_" in n) for n, p in model.named_parameters()}
    groups = [
        {"params": [p for p, d in decays.items() if d], "weight_decay": optim.weight_decay},
        {"params": [p for p, d in decays.items() if not d], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    losses, grad_norms = [], []
    for step in range(STEPS):
        (batch,) = batches_of(config, step)
        logits_BTV = model(input_ids=batch.tokens_BT).logits
        loss = F.cross_entropy(logits_BTV.flatten(0, 1), batch.labels_BT.flatten())
        loss.backward()
        grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip).item())
        for group in optimizer.param_groups:
            group["lr"] = Schedule(config).learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and min(grad_norms) > optim.clip
    return first, Trained(losses, grad_norms, logical(model))


def logical(model) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in from_hf(model.state_dict(), MODEL).items()}


def train_from(config: RunConfig, dp: int, weights: dict[str, Tensor]):
    """Train from given weights: what this rank saw, and its pieces of the last ones."""
    engine = start_engine(config, dp)
    for named in engine.parameters:
        engine.masters.write(named, WEIGHT, named.part.take(weights[named.name]))
    steps = [engine.train_step(step, batches_of(config, step, engine.mesh.data)) for step in range(STEPS)]
    pieces = pieces_of(engine, WEIGHT)
    engine.close()
    return [s.loss for s in steps], [s.grad_norm for s in steps], pieces


@pytest.mark.parametrize(
    "layout",
    [
        Layout(),
        Layout(dp=2, zero_stage=3, micro_batch_size=2),
        Layout(tp=2, pp=2, micro_batch_size=2),
        Layout(pp=2, dp=2, zero_stage=1, micro_batch_size=1),
    ],
    ids=str,
)
def test_trains_as_transformers_and_torch_do(theirs, layout):
    """Same weights, same text: gradients, accumulation, norm, clipping, decay and Adam against others' code."""
    first, expected = theirs
    ranks = run_ranks(train_from, layout.world_size, config_of(layout), layout.dp, first)
    for losses, grad_norms, _ in ranks:
        assert losses == pytest.approx(expected.losses, rel=1e-6)
        assert grad_norms == pytest.approx(expected.grad_norms, rel=1e-5)
    weights = merge([pieces for _, _, pieces in ranks])
    assert weights.keys() == expected.weights.keys()
    # Adam divides small gradients by small numbers: what counts is the share of the way that it can go.
    reach = sum(map(Schedule(config_of(layout)).learning_rate, range(STEPS)))
    for name, value in expected.weights.items():
        assert (weights[name] - value).abs().max().item() < 1e-4 * reach, name


DROPOUTS = {"dropout_embedding": 0.3, "dropout_attention": 0.3, "dropout_residual": 0.3}


def evaluate(config: RunConfig, dp: int) -> tuple[float, float, float]:
    """Evaluate the batches of two steps, train one, and evaluate them again."""
    engine = start_engine(config, dp)

    def once() -> float:
        batches = [batch for step in (3, 4) for batch in batches_of(config, step, engine.mesh.data)]
        return engine.evaluate(iter(batches), len(batches))

    before, loss, after = once(), engine.train_step(0, batches_of(config, 0, engine.mesh.data)).loss, once()
    engine.close()
    return before, loss, after


@pytest.mark.parametrize(
    "layout", [Layout(pp=2, dp=2, zero_stage=1, micro_batch_size=2), Layout(tp=2, dp=2, zero_stage=3)]
)
def test_evaluation_is_the_mean_loss_without_dropout(layout):
    config = config_of(layout, dataclasses.replace(MODEL, **DROPOUTS))
    model = GPT(config.model, SINGLE, config.train.seed)
    batches = [next(batches_of(config_of(Layout(micro_batch_size=8)), step)) for step in (0, 3, 4)]
    with torch.no_grad():
        with_dropout = model(batches[0].tokens_BT, batches[0].sample_ids_B, batches[0].labels_BT)
        model.eval()
        losses = [model(b.tokens_BT, b.sample_ids_B, b.labels_BT) for b in batches]
    answers = set(run_ranks(evaluate, layout.world_size, config, layout.dp))
    ((before, trained, after),) = answers  # all ranks say the same
    assert before == pytest.approx(torch.stack(losses[1:]).mean().item(), rel=1e-6)
    assert trained == pytest.approx(with_dropout.item(), rel=1e-6)
    assert abs(trained - losses[0].item()) > 1e-4  # dropout does something, and evaluation did not turn it off
    assert after < before - 1e-3


def disturb(config: RunConfig, dp: int, name: str, rank: int) -> str:
    """Check, change one element of one rank's copy, check again; returns the message."""
    engine = start_engine(config, dp)
    engine.train_step(0, batches_of(config, 0, engine.mesh.data))
    check_ranks(engine, 0)
    for named in engine.parameters:
        if named.name == name and engine.mesh.rank == rank:
            engine.backend.local_weights(named)[-1].view(-1)[1] += 2**-10
    try:
        check_ranks(engine, 1)
    except RankError as error:
        return str(error)
    return "nothing found"


@pytest.mark.parametrize(
    ("layout", "name", "rank"),
    [
        (Layout(dp=2, zero_stage=1), "blocks.0.attention.qkv.weight", 1),  # over the data axis
        (Layout(tp=2), "blocks.1.mlp.down.bias", 1),  # over the model axis
        (Layout(tp=2, dp=2, zero_stage=3), "head.norm.weight", 0),
        (Layout(pp=2), "embedding.tokens.weight", 1),  # tied ends
    ],
    ids=str,
)
def test_check_ranks_finds_a_disturbed_copy(layout, name, rank):
    for message in run_ranks(disturb, layout.world_size, config_of(layout), layout.dp, name, rank):
        assert f"{name} differs between ranks" in message and "step 2" in message


def engine_with_json(config: RunConfig) -> tuple[int, float, str]:
    """What of a user's JSON arrived in DeepSpeed, and the message of one that contradicts."""
    engine = start_engine(config, 1)
    inner = vars(engine.backend)["_engine"]  # DeepSpeed's own
    bucket, period = inner.zero_reduce_bucket_size(), inner.steps_per_print()
    engine.close()
    wrong = dataclasses.replace(config, optim=dataclasses.replace(config.optim, clip=0.7))
    try:
        start_engine(wrong, 1)
    except UserError as error:
        return bucket, period, str(error)
    return bucket, period, "nothing refused"


def test_a_deepspeed_json_passes_through_or_is_refused(tmp_path):
    path = tmp_path / "ds.json"
    settings = {
        "steps_per_print": 7,
        "gradient_clipping": 0.3,
        "train_batch_size": "auto",
        "zero_optimization": {"stage": 1, "reduce_bucket_size": 12345},
    }
    path.write_text(json.dumps(settings))
    config = config_of(Layout(zero_stage=1))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, deepspeed_config=str(path)))
    ((bucket, period, message),) = run_ranks(engine_with_json, 1, config)
    assert (bucket, period) == (12345, 7)
    assert message == (f"{path}: gradient_clipping=0.3 contradicts optim.clip=0.7; remove the key or use --clip 0.3")


def refuse_fp16(config: RunConfig) -> str:
    type(get_accelerator()).is_fp16_supported = lambda self: False
    with pytest.raises(UserError) as caught:
        start_engine(config, 1)
    return str(caught.value)


def test_fp16_without_a_device_for_it_is_refused():
    config = config_of(Layout(zero_stage=1))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="fp16"))
    (message,) = run_ranks(refuse_fp16, 1, config)
    assert message.startswith("train.precision=fp16 needs a GPU") and message.endswith("use --precision bf16")
