"""What a guarded run does about bad steps: says where they come from, writes it down, goes on, or stops."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deepspeed.accelerator import get_accelerator

from megagpt.checkpoint.state import State
from megagpt.config import DebugConfig, RunConfig
from megagpt.data.tokenizers.tokenizer import build_tokenizer
from megagpt.errors import UserError
from megagpt.processes.agree import RankError
from megagpt.processes.local import run_ranks
from megagpt.train.faults.guard import Guard
from megagpt.train.faults.notes import FaultNotes, Rewind, add_rewind, read_rewinds
from megagpt.train.step.engine import StepResult
from tests.parity.rank import batches_of, start_engine
from tests.parity.walk import Layout
from tests.train.plants import BAD, STEPS, Plant, all_of, config_of, planted, same, zero


class Texts:
    """Samples whose text tells their position."""

    def __getitem__(self, i: int) -> np.ndarray:
        return np.frombuffer(f"sample {i} ".encode() * 300, np.uint8).astype(np.int64)

    def sources_of(self, i: int) -> list[tuple[str, int, int, int]]:
        return [("corpus", i, 0, 10), ("corpus", i + 1, 0, 7)]


def guarded(engine: Any, folder: str, lines: list[str]) -> Guard:
    notes: Any = FaultNotes(Path(folder), Texts(), build_tokenizer("bytes"), engine.mesh.rank == 0)  # pyright: ignore[reportArgumentType]
    return Guard(engine, notes, lines.append, lambda step: batches_of(engine.config, step, engine.mesh.data))


def run_guarded(config: RunConfig, dp: int, folder: str, plant: Plant | None, bad: tuple[int, ...] = (BAD,)) -> tuple:
    """Train with the plant in some steps: what was skipped, said, and raised; and everything in the end."""
    engine = start_engine(config, dp)
    lines: list[str] = []
    guard = guarded(engine, folder, lines)
    skipped, error = [], ""
    try:
        for step in range(STEPS):
            with planted(engine, plant) if plant and step in bad else contextlib.nullcontext():
                skipped.append(guard.train_step(step).skipped)
    except RankError as raised:
        error = f"{raised} {raised.speaks}"
    return skipped, lines, error, (engine.counters, all_of(engine))


LAYOUTS = {
    "one": Layout(micro_batch_size=2),
    "tp2": Layout(tp=2, micro_batch_size=2),
    "tp2 pp2": zero(1, Layout(tp=2, pp=2, micro_batch_size=2)),
    "dp2 zero3": Layout(dp=2, zero_stage=3, micro_batch_size=2),
    "pp2 dp2": Layout(pp=2, dp=2, zero_stage=1, micro_batch_size=1),
}
FIRST = BAD * 8  # the position of the step's first sample


PARAMETER = "gradient of the parameter"


@pytest.mark.parametrize(
    ("layout", "plant", "kind", "what", "positions"),
    [
        ("one", Plant("loss", "head", 0, torch.inf), "loss", "gradient of the output", [2, 3]),
        ("tp2", Plant("activation", "blocks.1/mlp.up", 1), "loss", "output", [2]),
        ("tp2", Plant("gradient", "head.norm.weight", 1), "gradient", PARAMETER, [2, 3]),
        ("tp2 pp2", Plant("activation", "blocks.0/norm_1", 1), "loss", "output", [2]),
        ("tp2 pp2", Plant("gradient", "blocks.3.mlp.up.weight", 3, micro_batch=3), "gradient", PARAMETER, [6, 7]),
        ("dp2 zero3", Plant("gradient", "blocks.1.mlp.up.weight", 1), "gradient", PARAMETER, [6, 7]),
        ("dp2 zero3", Plant("activation", "blocks.3/attention.qkv", 1, micro_batch=0), "loss", "output", [2]),
        ("pp2 dp2", Plant("activation", "blocks.3/norm_2", 3, micro_batch=2), "loss", "output", [5]),
    ],
)
def test_the_first_module_and_its_samples_are_written_down(tmp_path, layout, plant, kind, what, positions):
    spread, module = LAYOUTS[layout], plant.where.replace("/", ".")
    ranks = run_ranks(run_guarded, spread.world_size, config_of(spread), spread.dp, str(tmp_path), plant)
    path = tmp_path / "faults" / "step-000003.json"
    place = f"rank {plant.rank} (pipe {plant.rank * spread.pp // spread.world_size}, data "
    for skipped, lines, error, (counters, _) in ranks:
        assert skipped == [step == BAD for step in range(STEPS)] and not error
        assert counters["skipped_steps"] == 1
        (line,) = lines
        assert line.startswith("step 3 skipped (loss ") and str(path) in line
        assert f"first in {module} ({what}) on {place}" in line and f"micro-batch {plant.micro_batch};" in line
    note = json.loads(path.read_text())
    assert (note["step"], note["kind"], note["outcome"]) == (3, kind, "skipped")
    assert (note["first"]["module"], note["first"]["what"], note["first"]["rank"]) == (module, what, plant.rank)
    assert note["first"]["place"].startswith(place) and note["first"]["host"]
    expected = [FIRST + p for p in positions]
    assert [s["position"] for s in note["samples"]] == expected
    for sample, position in zip(note["samples"], expected, strict=True):
        assert sample["text"].startswith(f"sample {position} sample") and len(sample["text"]) == 2000
        assert sample["documents"][1] == {
            "dataset": "corpus",
            "document": position + 1,
            "first_token": 0,
            "n_tokens": 7,
        }


def test_what_does_not_happen_again_was_the_machine(tmp_path):
    """The step counts as it was when done again: the run is that of a machine without fault, to the bit."""
    layout = LAYOUTS["tp2 pp2"]
    plants = (None, Plant("activation", "blocks.0/mlp.up", 1, once=True))
    right, wrong = (
        run_ranks(run_guarded, layout.world_size, config_of(layout), 1, str(tmp_path), plant) for plant in plants
    )
    for (_, _, _, expected), (skipped, lines, error, outcome) in zip(right, wrong, strict=True):
        assert not any(skipped) and not error
        assert expected[0] == outcome[0] and same(expected[1], outcome[1])
        assert len(lines) == 1 and lines[0].startswith("WARNING: step 3 had a NaN or Inf (loss nan")
    note = json.loads((tmp_path / "faults" / "step-000003.json").read_text())
    assert (note["kind"], note["outcome"], note["loss"]) == ("machine", "done again", "nan")
    assert note["again"]["loss"] < 10 and len(note["samples"]) == 8


def train_in_fp16(config: RunConfig, folder: str, plant: Plant | None, with_guard: bool) -> tuple:
    """On a CPU, which DeepSpeed would refuse, as it is slow there."""
    type(get_accelerator()).is_fp16_supported = lambda self: True
    engine = start_engine(config, 1)
    lines: list[str] = []
    guard, skipped = guarded(engine, folder, lines), []
    for step in range(STEPS):
        with planted(engine, plant) if plant and step == BAD else contextlib.nullcontext():
            batches = batches_of(config, step, engine.mesh.data)
            result = guard.train_step(step) if with_guard else engine.train_step(step, batches)
            skipped.append(result.skipped)
    return skipped, lines, engine.counters, all_of(engine)


@pytest.mark.slow
def test_fp16_keeps_its_loss_scaling(tmp_path):
    """Doing a step again does not count twice; and an overflow that it takes for one of scaling needs no word."""
    config = config_of(zero(2, LAYOUTS["tp2"]), "fp16")
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, kernels="reference"))
    right = run_ranks(train_in_fp16, 2, config, str(tmp_path), None, True)
    assert not any(right[0][0])
    for plant, n_lines in ((Plant("loss", "", 1, torch.inf), 1), (Plant("gradient", "head.norm.weight", 1), 0)):
        plain = run_ranks(train_in_fp16, 2, config, str(tmp_path), plant, False)
        ours = run_ranks(train_in_fp16, 2, config, str(tmp_path), plant, True)
        for (skipped, _, counters, tensors), (their_skipped, lines, *their_outcome) in zip(plain, ours, strict=True):
            assert skipped == their_skipped == [step == BAD for step in range(STEPS)]
            assert len(lines) == n_lines and counters == their_outcome[0] and same(tensors, their_outcome[1])
    once = Plant("activation", "blocks.1/mlp.up", 0, once=True)
    healed = run_ranks(train_in_fp16, 2, config, str(tmp_path), once, True)
    assert all(a[2] == b[2] and same(a[3], b[3]) for a, b in zip(right, healed, strict=True))


def faults(config: RunConfig, **values: Any) -> RunConfig:
    return dataclasses.replace(config, faults=dataclasses.replace(config.faults, **values))


def test_too_many_bad_steps_end_the_run(tmp_path):
    """Not before they come in a row, and with one message, which names the file."""
    config, plant = faults(config_of(LAYOUTS["tp2"]), max_bad_steps=2), Plant("gradient", "blocks.2.mlp.up.weight", 1)
    answers = run_ranks(run_guarded, 2, config, 1, str(tmp_path), plant, (0, 2, 3))
    for rank, (skipped, lines, error, _) in enumerate(answers):
        assert skipped == [True, False, True] and len(lines) == 2
        assert error.startswith(
            "step 4: a NaN or Inf in 2 steps in a row (faults.max_bad_steps): first in blocks.2.mlp.up"
        )
        assert error.endswith(f"{tmp_path}/faults/step-000004.json {rank == 0}")


def spoil_weight(config: RunConfig, dp: int, folder: str, name: str, rank: int) -> str:
    """A NaN in the weight of one rank, after a step."""
    engine = start_engine(config, dp)
    guard = guarded(engine, folder, [])
    guard.train_step(0)
    for named in engine.parameters:
        if named.name == name and engine.mesh.rank == rank:
            for values in (named.parameter, getattr(named.parameter, "ds_tensor", named.parameter)):
                values.data.view(-1)[:1] = torch.nan
    with pytest.raises(RankError) as caught:
        guard.train_step(1)
    return f"{caught.value} {caught.value.speaks}"


@pytest.mark.parametrize(("layout", "rank"), [("tp2 pp2", 3), ("dp2 zero3", 1), ("one", 0)])
def test_a_weight_that_is_gone_ends_the_run_at_once(tmp_path, layout, rank):
    spread, name = LAYOUTS[layout], "blocks.2.mlp.up.weight"
    answers = run_ranks(spoil_weight, spread.world_size, config_of(spread), spread.dp, str(tmp_path), name, rank)
    for index, message in enumerate(answers):
        assert message.startswith(f"step 2: the weight {name} holds a NaN or Inf on rank {rank} (pipe")
        assert f"--load {tmp_path} (more: {tmp_path}/faults/step-000002.json) {index == 0}" in message
    assert json.loads((tmp_path / "faults" / "step-000002.json").read_text())["weight"]["rank"] == rank


@pytest.mark.parametrize(("layout", "rank"), [("one", 0), ("tp2 pp2", 2), ("pp2 dp2", 2)])
def test_detect_nan_stops_at_the_first_module(tmp_path, layout, rank):
    """In the third of four blocks: of the second stage, whose ranks are 2 and 3."""
    spread = LAYOUTS[layout]
    config = dataclasses.replace(config_of(spread), debug=DebugConfig(detect_nan=True))
    name = "blocks.2.mlp.up"
    answers = run_ranks(spoil_weight, spread.world_size, config, spread.dp, str(tmp_path), f"{name}.weight", rank)
    for index, message in enumerate(answers):
        assert message.startswith(f"step 2, rank {rank}: {name} is the first module with a NaN or Inf; its text: ")
        assert message.endswith(f" {index == rank}")


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "faults").write_text("no folder")
    plant = Plant("gradient", "blocks.2.mlp.up.weight", 0)
    ((skipped, lines, error, _),) = run_ranks(run_guarded, 1, config_of(LAYOUTS["one"]), 1, str(tmp_path), plant)
    assert sum(skipped) == 1 and not error and "not in " in lines[0] and "cannot be written (File exists)" in lines[0]


def leave_out_and_go_on(config: RunConfig, folder: str) -> tuple:
    """Leave steps out, as listed; then what a guard takes over from a checkpoint and from another run's folder."""
    engine = start_engine(config, 1)
    guard = guarded(engine, folder, [])
    results = [guard.train_step(step) for step in range(STEPS)]
    counters = engine.counters, engine.backend.optimizer.state[engine.parameters[0].parameter]["step"].item()
    other = Path(folder) / "other"
    other.mkdir()
    add_rewind(other, Rewind(40, 20, "loss", 9.0, 20.0))
    state = State(step=5, samples=40, tokens=1, lr=0.0, counters={}, config={}, data={}, skipped_steps=[7])
    guard.go_on_from(dataclasses.replace(state, guard=guard.state), other / "checkpoints" / "step-000005")
    return [(r.skipped, r.loss) for r in results], *counters, guard.left_out


def test_steps_are_left_out_as_listed_and_as_rewound(tmp_path):
    config = faults(config_of(LAYOUTS["one"]), skip_steps="2,4-5")
    add_rewind(tmp_path, Rewind(1, 0, "loss", 9.0, 20.0))
    ((results, counters, adam_steps, left_out),) = run_ranks(leave_out_and_go_on, 1, config, str(tmp_path))
    assert [skipped for skipped, _ in results] == [True, True, False, True, True]
    assert all(math.isnan(loss) == skipped for skipped, loss in results)
    assert counters["skipped_steps"] == 4 and adam_steps == 1
    assert left_out == [1, 2, 4, 5, 7, 40]


def judge_steps(config: RunConfig, folder: str, losses: list[float], last: str | None) -> tuple:
    """Let a guard judge made-up steps: when it wanted to go back, what it said and raised, and what it knows."""
    engine = start_engine(config, 1)
    lines: list[str] = []
    guard = guarded(engine, folder, lines)
    back, error = [], ""
    try:
        for step, loss in enumerate(losses):
            result = StepResult(loss, 1.0, 0.1, 1.0, skipped=False, step_time_s=0.1)
            if guard.judge(step, result, lambda: Path(last) if last else None):
                back.append(step + 1)
    except RankError as raised:
        error = str(raised)
    return back, lines, error, guard.left_out, guard.state


CURVE = [3 + 0.05 * (-1) ** i for i in range(100)]


def test_a_spike_is_written_down_or_gone_back_for(tmp_path):
    config = config_of(LAYOUTS["one"])
    losses = [*CURVE, 9.0, 9.0, *CURVE]  # one that lasts two steps
    logged, rewinding = tmp_path / "logged", tmp_path / "rewinding"
    for folder in (logged, rewinding):
        folder.mkdir()
    ((back, lines, _, left_out, _),) = run_ranks(judge_steps, 1, config, str(logged), losses, "step-000080")
    assert (back, left_out) == ([], []) and len(lines) == 1
    assert lines[0].startswith("step 101: spike: loss 9, 81 robust standard deviations above the median 3 of")
    note = json.loads((logged / "faults" / "step-000101.json").read_text())
    assert (note["kind"], note["what"], note["outcome"]) == ("spike", "loss", "trained on")
    assert [sample["position"] for sample in note["samples"]] == list(range(800, 808))

    config = faults(config, on_spike="rewind", max_rewinds=2)
    ((back, lines, _, left_out, _),) = run_ranks(judge_steps, 1, config, str(rewinding), losses, None)
    assert back == [] and lines[0].endswith("; there is no checkpoint to go back to")
    losses = [*CURVE, 9.0, *CURVE, 9.0, *CURVE, 9.0]
    ((back, lines, error, left_out, _),) = run_ranks(judge_steps, 1, config, str(rewinding), losses, "step-000080")
    assert back == left_out == [101, 202] and lines[1].endswith("going back to step-000080, and on without step 202")
    assert error.startswith("step 303: spike: ") and "after 2 rewinds (faults.max_rewinds)" in error
    assert [(r.step, r.back_to) for r in read_rewinds(rewinding)] == [(101, 80), (202, 80)]


@pytest.mark.parametrize(
    "text",
    ["{}", "[1]", '[{"step": 1}]', "nonsense", '[{"step": "x", "back_to": 1, "what": "", "value": 1, "zscore": 1}]'],
)
def test_a_damaged_list_of_rewinds_is_told(tmp_path, text):
    (tmp_path / "skipped_steps.json").write_text(text)
    with pytest.raises(UserError, match=r"skipped_steps.json: not a list of rewinds .*--faults.skip-steps"):
        read_rewinds(tmp_path)
