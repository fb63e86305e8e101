"""Adapters in training: one run, any layout; nothing kept for what is frozen; saved alone, and resumed bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megagpt.checkpoint.adapters import base_from_load, base_of, find_base, read_adapters
from megagpt.checkpoint.folders import folder_of
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.save import Saver
from megagpt.checkpoint.state import State, read_state
from megagpt.config import CheckpointConfig, LoraConfig, ModelConfig, RunConfig, plain
from megagpt.errors import UserError
from megagpt.inventory.layers import canonical
from megagpt.processes.local import run_ranks
from megagpt.train.step.engine import Engine
from tests.checkpoint.written_checkpoint import MODEL, write_checkpoint
from tests.parity.rank import batches_of, start_engine
from tests.parity.walk import REFERENCE, Layout, compare, parity_config, run_layout, spread_out

JOINT = ModelConfig(
    n_layers=2, d_model=32, n_heads=4, seq_len=24, vocab_size=211,
    dropout_embedding=0.1, dropout_attention=0.1, dropout_residual=0.1,
)  # fmt: skip
# Shared keys of one head and a gate: B whole on every rank of two, and packed.
GROUPED = dataclasses.replace(
    JOINT, n_kv_heads=1, activation="swiglu", norm="rmsnorm", position="rotary", bias_attention=False
)
ONE_SUM = dataclasses.replace(GROUPED, block="parallel", bias_mlp=False, dropout_residual=0.0, tied_embeddings=False)
LORA = LoraConfig(rank=3, alpha=6.0, dropout=0.2)
N_STEPS = 6


def config_of(model: ModelConfig, **lora) -> RunConfig:
    config = parity_config(model)
    train = dataclasses.replace(config.train, train_steps=N_STEPS)
    return dataclasses.replace(config, train=train, lora=dataclasses.replace(LORA, **lora))


CASES = {
    "joint": (JOINT, [Layout(tp=2, pp=2, micro_batch_size=2), Layout(dp=2, zero_stage=3)]),
    "shared keys and a gate": (GROUPED, [Layout(tp=2, dp=2, zero_stage=2, recompute=True)]),
    "one sum": (ONE_SUM, [Layout(tp=2, micro_batch_size=2)]),
}


@pytest.mark.parametrize("name", CASES)
def test_one_run_any_layout(name):
    """Dropout and clipping on. Weights end apart by more than those of whole matrices may: the first gradients of A are
    tiny, as B is, and Adam divides their round-off by their size. What is summed wrongly is off by a tenth.
    """
    model, layouts = CASES[name]
    config = config_of(model)
    reference = run_layout(config, REFERENCE)
    assert all(".lora." in weight for weight in reference.weights)
    assert all(bool(w.any()) for w in reference.weights.values())
    for layout in layouts:
        far = compare(run_layout(config, layout), reference, config)
        assert far.loss <= 1e-6 and far.grad_norm <= 3e-6, f"{layout}: {far}"
        assert far.gradient <= 1e-5 and far.weight <= 1e-3, f"{layout}: {far}"


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a rank holds of a run with adapters. losses: of the steps after the save, here and from the checkpoint."""

    base_loss: float
    first_loss: float
    n_trained: int
    n_state: int
    with_gradients: list[str]
    losses: tuple[list[float], list[float]]


def save(engine: Engine, run: Path, step: int) -> None:
    saver = Saver(engine.masters, run, CheckpointConfig())
    config, n = plain(engine.config), engine.config.train.global_batch_size
    tokens = step * n * engine.config.model.seq_len
    saver.save(
        State(step=step, samples=step * n, tokens=tokens, lr=0.1, counters=engine.counters, config=config, data={})
    )
    saver.wait()


def adapt(config: RunConfig, dp: int, runs: Path) -> Kept:
    """A base, saved; adapters on it, saved halfway; and the same again from there."""
    plain_run = dataclasses.replace(config, lora=LoraConfig())
    base = start_engine(plain_run, dp)
    base_loss = base.evaluate(batches_of(plain_run, 0, base.mesh.data), base.plan.micro_batches)
    save(base, runs / "base", 0)
    base.close()
    config = dataclasses.replace(config, lora=dataclasses.replace(config.lora, base=str(folder_of(runs / "base", 0))))
    engine = start_engine(config, dp)
    seen: list[str] = []
    for named in engine.parameters:
        if named.parameter.requires_grad:
            named.parameter.register_hook(lambda grad, name=named.name: seen.append(name))
    first_loss = engine.evaluate(batches_of(config, 0, engine.mesh.data), engine.plan.micro_batches)
    run_steps(engine, 0, 2)
    save(engine, runs / "a", 2)
    n_state = sum(v.numel() for state in engine.backend.optimizer.state.values() for v in state.values() if v.dim())
    n_trained = sum(master.numel() for master in engine.masters.segments.masters)
    losses = run_steps(engine, 2, N_STEPS)
    engine.close()
    again = start_engine(config, dp)
    again.load(folder_of(runs / "a", 2))
    return Kept(base_loss, first_loss, n_trained, n_state, sorted({*seen}), (losses, run_steps(again, 2, N_STEPS)))


def run_steps(engine: Engine, first: int, last: int) -> list[float]:
    return [engine.train_step(s, batches_of(engine.config, s, engine.mesh.data)).loss for s in range(first, last)]


# With ZeRO 3 (and a threshold that leaves large weights cut) the base is read into shards.
LAYOUTS = [Layout(tp=2, micro_batch_size=2), Layout(pp=2, micro_batch_size=2), Layout(dp=2, zero_stage=3)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_only_adapters_are_kept_saved_and_resumed(layout, tmp_path):
    config, cut = spread_out(config_of(JOINT), layout), tmp_path / "cut.json"
    if layout.zero_stage == 3:
        cut.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 100}}')
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, deepspeed_config=str(cut)))
    for kept in run_ranks(adapt, layout.world_size, config, layout.dp, tmp_path):
        assert kept.first_loss == kept.base_loss  # B is zero: the base's weights, to the bit
        assert kept.with_gradients and all(".lora." in name for name in kept.with_gradients)
        assert kept.n_state == 2 * kept.n_trained  # Adam's moments, and of the base none
        assert kept.losses[0] == kept.losses[1]
    with Reader(folder_of(tmp_path / "a", 2)) as reader:
        assert set(reader.index) == {"weight", "exp_avg", "exp_avg_sq"}
        wanted = {f"{n.removesuffix('.weight')}.lora.{f}" for n in weights_adapted(config.model) for f in "ab"}
        assert set(reader.index["weight"]) == set(reader.index["exp_avg"]) == wanted


def weights_adapted(model: ModelConfig) -> list[str]:
    return [n for n, p in canonical(model).items() if n.startswith("blocks.") and p.kind == "map"]


def adapters_run(run: Path, base: Path, **state) -> Path:
    """A checkpoint that says that it holds adapters of `base`."""
    lora = LoraConfig(rank=2, base=str(base))
    tensors = {
        "weight": {
            "blocks.0.mlp.up.lora.a": torch.ones(2, 16).numpy(),
            "blocks.0.mlp.up.lora.b": torch.ones(64, 2).numpy(),
        }
    }
    config = plain(RunConfig(model=MODEL, lora=lora))
    return write_checkpoint(run, tensors=tensors, config=config, **state)


def lora_run(load: Path | None, **lora) -> RunConfig:
    checkpoint = CheckpointConfig(load=None if load is None else str(load))
    return RunConfig(model=MODEL, lora=LoraConfig(rank=2, **lora), checkpoint=checkpoint)


def test_load_means_the_base_where_it_holds_no_adapters(tmp_path):
    base, a = write_checkpoint(tmp_path / "base"), adapters_run(tmp_path / "a", tmp_path / "base")
    begun = base_from_load(lora_run(tmp_path / "base"))
    assert (begun.lora.base, begun.checkpoint.load) == (str(tmp_path / "base"), None)
    assert find_base(begun, None).lora.base == str(base)
    going_on = lora_run(tmp_path / "a")
    assert base_from_load(going_on) == going_on
    assert find_base(going_on, read_state(a)).lora.base == str(base)
    assert base_of(a) == base
    with pytest.raises(UserError, match="are two bases; leave out one"):
        base_from_load(lora_run(tmp_path / "base", base=str(tmp_path / "a")))
    with pytest.raises(UserError, match="adapts the weights of a trained model"):
        find_base(lora_run(None), None)


def test_a_base_with_other_weights_is_refused(tmp_path):
    write_checkpoint(tmp_path / "base")
    a = adapters_run(tmp_path / "a", tmp_path / "base", base_sha256="0" * 64)
    with pytest.raises(UserError, match="are not those that these adapters were trained beside"):
        find_base(lora_run(tmp_path / "a"), read_state(a))


def test_adapters_add_to_each_part_of_a_weight_what_is_its(tmp_path):
    adapters = read_adapters(adapters_run(tmp_path / "a", tmp_path / "base"))
    assert adapters.scale == 8.0
    merged = adapters.merged("blocks.0.mlp.up.weight", torch.zeros(64, 16))
    assert torch.equal(merged, torch.full((64, 16), 16.0))
