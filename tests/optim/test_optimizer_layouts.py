"""One run, any layout, with each optimizer: losses, weights, what it keeps, and going on from a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megagpt.checkpoint import folders
from megagpt.checkpoint.compare import differing_tensors
from megagpt.checkpoint.load import check_resumable
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.save import Saver
from megagpt.checkpoint.state import State
from megagpt.config import CheckpointConfig, ModelConfig, OptimConfig, RunConfig, plain
from megagpt.errors import UserError
from megagpt.inventory.parameter import AVERAGE, WEIGHT
from megagpt.optim import segments
from megagpt.processes.local import run_ranks
from megagpt.train.step.engine import Engine
from tests.parity.rank import RankReport, batches_of, start_engine, train_on_rank
from tests.parity.walk import (
    BOUNDS,
    REFERENCE,
    Difference,
    Layout,
    Outcome,
    compare,
    outcome_of,
    parity_config,
    spread_out,
)
from tests.train.plants import Plant, planted

# Heads share keys and the MLP has a gate: matrices of several maps. 211 rows of the vocabulary are cut unevenly. No
# biases in the attention: the key's has a gradient of round-off alone, and Lion takes the sign of it.
MODEL = ModelConfig(
    n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, seq_len=24, vocab_size=211, activation="swiglu", d_ff=48,
    bias_attention=False, dropout_embedding=0.1, dropout_residual=0.1,
)  # fmt: skip
STEPS, SAVED = 8, 4

# Rates at which each one trains; eps keeps round-off from being divided by itself (parity.py).
OPTIMS = {
    "adam": OptimConfig(optimizer="adam", lr=2e-2, weight_decay=0.01),
    "adafactor": OptimConfig(optimizer="adafactor", lr=0.3),
    "adafactor_unfactored": OptimConfig(optimizer="adafactor_unfactored", lr=0.6, weight_decay_times="lr_squared"),
    "lion": OptimConfig(optimizer="lion", lr=1e-2),
    "muon": OptimConfig(optimizer="muon", lr=2e-2),
}
TP_PP = Layout(tp=2, pp=2, zero_stage=1, micro_batch_size=2)
TP_ZERO3 = Layout(tp=2, dp=2, zero_stage=3, micro_batch_size=1)
ZERO2 = Layout(dp=4, zero_stage=2, micro_batch_size=2)
TP_DP = Layout(tp=2, dp=2, micro_batch_size=4)

CASES = [
    ("adam", TP_PP), ("lion", ZERO2), ("adafactor_unfactored", TP_ZERO3),
    ("adafactor", TP_PP), ("adafactor", ZERO2), ("muon", TP_PP), ("muon", TP_ZERO3), ("muon", TP_DP),
]  # fmt: skip


def config_of(name: str, model: ModelConfig = MODEL, **optim) -> RunConfig:
    config = parity_config(model)
    settings = dataclasses.replace(OPTIMS[name], warmup_steps=2, clip=0.3, eps=1e-6, **optim)
    return dataclasses.replace(config, optim=settings, train=dataclasses.replace(config.train, train_steps=STEPS))


@cache
def reference(name: str) -> Outcome:
    outcome = outcome_of(run_ranks(train_on_rank, 1, spread_out(config_of(name), REFERENCE), 1))
    assert outcome.losses[-1] < 0.9 * outcome.losses[0], outcome.losses
    assert min(outcome.grad_norms) > 0.3  # clipped at every step
    return outcome


@pytest.mark.parametrize(("name", "layout"), CASES, ids=str)
def test_an_optimizer_steps_alike_on_every_layout(name, layout):
    config = config_of(name)
    outcome = outcome_of(run_ranks(train_on_rank, layout.world_size, spread_out(config, layout), layout.dp))
    difference = compare(outcome, reference(name), config)
    assert difference.ok, difference


@pytest.mark.parametrize(("name", "stage"), [("adafactor", 1), ("muon", 1), ("muon", 2)])
def test_in_bf16_it_stays_near_fp32(name, stage):
    config = config_of(name)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16"))
    spread = spread_out(config, Layout(dp=2, zero_stage=stage, micro_batch_size=2))
    difference = compare(outcome_of(run_ranks(train_on_rank, 2, spread, 2)), reference(name), config)
    assert difference.ok, difference
    assert difference.loss > 1e-6  # it was not fp32 that ran


def sums_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments.Segments, "totals", lambda self, parts, values: values)


def replicas_count_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what every rank of the model axis holds alike."""
    totals = segments.Segments.totals

    def all_counted(self: segments.Segments, parts: list[segments.Segment], values: list[Tensor]) -> list[Tensor]:
        twice = [v * (1 if p.named.part.dim is not None else self.mesh.model.size) for p, v in zip(parts, values)]  # noqa: B905
        return totals(self, parts, twice)

    monkeypatch.setattr(segments.Segments, "totals", all_counted)


def shards_are_made_orthogonal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "all_reduce", lambda full, axis: full)


FAULTS = [
    (sums_are_not_shared, "adafactor", Layout(tp=2)),
    (sums_are_not_shared, "adafactor_unfactored", Layout(dp=2, zero_stage=1)),
    (replicas_count_twice, "adafactor", Layout(tp=2)),
    (shards_are_made_orthogonal, "muon", Layout(tp=2)),
]


def train_with(fault: Callable[[pytest.MonkeyPatch], None], config: RunConfig, dp: int) -> RankReport:
    fault(pytest.MonkeyPatch())  # this process ends with the run
    return train_on_rank(config, dp)


@pytest.mark.parametrize(("fault", "name", "layout"), FAULTS, ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_fault_is_found(fault, name, layout):
    config = config_of(name)
    ranks = run_ranks(train_with, layout.world_size, fault, spread_out(config, layout), layout.dp)
    difference: Difference = compare(outcome_of(ranks), reference(name), config)
    assert not difference.ok and difference.weight > 100 * BOUNDS["fp32"].weight, difference


def state_of(engine: Engine, step: int) -> State:
    return State(
        step=step, samples=step * 8, tokens=step * 192, lr=0.1, counters=engine.counters,
        config=plain(engine.config), data={},
    )  # fmt: skip


def save(engine: Engine, run: Path, step: int) -> None:
    saver = Saver(engine.masters, run, CheckpointConfig(keep_last=10))
    saver.save(state_of(engine, step))
    saver.wait()


def train_and_save(config: RunConfig, dp: int, run: Path, load: Path | None = None) -> list[float]:
    """Train to SAVED, or load what did; save; train to the end, save. The losses after SAVED."""
    engine = start_engine(config, dp)
    step = lambda number: engine.train_step(number, batches_of(config, number, engine.mesh.data)).loss  # noqa: E731
    if load is None:
        for number in range(SAVED):
            step(number)
    else:
        assert engine.load(folders.find(f"{load}@{SAVED}")).step == SAVED
    save(engine, run, SAVED)
    losses = [step(number) for number in range(SAVED, STEPS)]
    save(engine, run, STEPS)
    return losses


def step_and_save(config: RunConfig, dp: int, run: Path) -> None:
    engine = start_engine(config, dp)
    engine.train_step(0, batches_of(config, 0, engine.mesh.data))
    save(engine, run, 1)


def differing(a: Path, b: Path) -> list[str]:
    with Reader(folders.find(a)) as ours, Reader(folders.find(b)) as theirs:
        return [f"{d.key} of {d.name}: {d.what}" for d in differing_tensors(ours, theirs)]


@pytest.mark.parametrize(
    ("name", "layout", "other"),
    [
        ("adafactor", TP_PP, Layout(dp=2, zero_stage=3, micro_batch_size=2)),
        ("muon", Layout(dp=2, zero_stage=2, micro_batch_size=2), Layout(tp=2, pp=2)),
        ("lion", Layout(zero_stage=2, offload_optimizer=True), Layout(tp=4)),
    ],
)
def test_a_run_goes_on_to_the_bit_and_on_another_layout_to_round_off(name, layout, other, tmp_path):
    run, again, elsewhere = (tmp_path / n for n in ("run", "again", "elsewhere"))
    config = config_of(name, dataclasses.replace(MODEL, n_kv_heads=None), ema_decay=0.9)
    train = lambda layout, *where: run_ranks(  # noqa: E731
        train_and_save, layout.world_size, spread_out(config, layout), layout.dp, *where
    )[0]
    losses = train(layout, run)
    assert train(layout, again, run) == losses
    assert differing(again, run) == []
    assert train(other, elsewhere, run) == pytest.approx(losses, rel=3e-6)
    assert differing(Path(f"{elsewhere}@{SAVED}"), Path(f"{run}@{SAVED}")) == []


def test_files_hold_what_each_optimizer_keeps(tmp_path):
    """By key: which parameters, and their shapes; no element is zero that has had a gradient."""
    kept = {}
    for name in ("adafactor", "muon"):
        layout = Layout(tp=2, zero_stage=1)
        run_ranks(step_and_save, 2, spread_out(config_of(name), layout), 1, tmp_path / name)
        with Reader(folders.find(tmp_path / name)) as reader:
            kept[name] = {key: {n: reader.shape(key, n) for n in names} for key, names in reader.index.items()}
            for key, name_ in ((k, n) for k, names in reader.index.items() if k != WEIGHT for n in names):
                assert (reader.read(key, name_) != 0).any(), (key, name_)
    weights = kept["muon"][WEIGHT]
    matrices = {n for n, shape in weights.items() if len(shape) >= 2 and not n.endswith("bias")}
    assert kept["muon"]["exp_avg"] == weights
    assert kept["muon"]["exp_avg_sq"].keys() == {n for n in weights if not (n in matrices and "blocks" in n)}
    rows, columns = kept["adafactor"]["exp_avg_sq_rows"], kept["adafactor"]["exp_avg_sq_columns"]
    assert rows.keys() == columns.keys() == matrices
    assert (rows["blocks.0.mlp.up.weight"], columns["blocks.0.mlp.up.weight"]) == ((2, 48), (2, 32))
    assert (rows["embedding.tokens.weight"], columns["embedding.tokens.weight"]) == ((211,), (32,))
    assert kept["adafactor"]["exp_avg_sq"].keys() == weights.keys() - matrices
    assert "exp_avg" not in kept["adafactor"] and AVERAGE not in kept["adafactor"]


@pytest.mark.bad_input(48)
def test_another_optimizer_is_refused():
    trained = plain(config_of("muon"))
    at = State(step=3, samples=24, tokens=9, lr=0.1, counters={}, config=trained, data={})
    with pytest.raises(UserError, match=r"was trained with optim\.optimizer=muon, this run wants lion; ") as caught:
        check_resumable(config_of("lion"), at, Path("run/checkpoints/step-000003"))
    assert "\n" not in str(caught.value)
    imported = dataclasses.replace(at, step=0, samples=0)
    check_resumable(config_of("lion"), imported, Path("run/checkpoints/step-000000"))


def average_and_weights(config: RunConfig, dp: int) -> tuple[list[Tensor], list[Tensor]]:
    """The average of a tensor at the start and after each step, a NaN in the third, and the weights at these times."""
    engine = start_engine(config, dp)
    (named,) = (n for n in engine.parameters if n.name == "blocks.1.mlp.up.weight")
    averages, weights = [], []
    for step in range(5):
        averages.append(engine.masters.read(named, AVERAGE).clone())
        weights.append(engine.masters.read(named, WEIGHT).clone())
        plant = Plant("gradient", "head.norm.bias", rank=0, micro_batch=0)
        batches = batches_of(config, step, engine.mesh.data)
        if step == 2:
            with planted(engine, plant):
                assert engine.train_step(step, batches).skipped
        else:
            assert not engine.train_step(step, batches).skipped
    return averages, weights


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2, zero_stage=1), Layout(dp=2, zero_stage=3)], ids=str)
def test_the_average_is_that_of_the_weights_and_leaves_out_skipped_steps(layout):
    config = config_of("adam", ema_decay=0.75)
    for averages, weights in run_ranks(average_and_weights, layout.world_size, spread_out(config, layout), layout.dp):
        expected = weights[0].double()
        for step, (average, weight) in enumerate(zip(averages, weights, strict=True)):
            if step not in (0, 3):  # after the third step, which moved nothing
                expected = 0.75 * expected + 0.25 * weight.double()
            assert (average - expected).abs().max() < 1e-7, step
        assert not torch.equal(averages[-1], weights[-1]) and torch.equal(averages[2], averages[3])


def load_averaged(config: RunConfig, dp: int, run: Path) -> bool:
    """Whether an average that the run did not keep begins with its weights."""
    engine = start_engine(config, dp)
    engine.load(folders.find(run))
    return all(torch.equal(engine.masters.read(n, AVERAGE), engine.masters.read(n, WEIGHT)) for n in engine.parameters)


def test_an_average_may_begin_in_the_middle(tmp_path):
    layout = Layout(dp=2, zero_stage=1)
    run_ranks(step_and_save, 2, spread_out(config_of("lion"), layout), 2, tmp_path)
    averaging = config_of("lion", ema_decay=0.9)
    assert all(run_ranks(load_averaged, 2, spread_out(averaging, layout), 2, tmp_path))
