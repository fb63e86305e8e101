"""Checkpoints: the same tensors and the same losses, whatever layout wrote and whatever layout reads."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from safetensors import safe_open
from torch import Tensor

from megagpt.checkpoint import folders
from megagpt.checkpoint.integrity import damage_of
from megagpt.checkpoint.load import check_resumable, find_whole
from megagpt.checkpoint.save import Saver, assign_writers
from megagpt.checkpoint.state import State, read_state
from megagpt.config import CheckpointConfig, ModelConfig, RunConfig, plain
from megagpt.errors import UserError
from megagpt.inventory.parameter import WEIGHT
from megagpt.processes.agree import RankError
from megagpt.processes.local import run_ranks
from megagpt.train.step.engine import Engine
from tests.parity.rank import LocalPart, batches_of, pieces_of, start_engine
from tests.parity.walk import Layout, merge, parity_config, spread_out

SAVED, LAST = 3, 6
# 33 and 211 are divided by no axis: shards of ZeRO and of the vocabulary are uneven.
MODEL = ModelConfig(
    n_layers=4, d_model=33, d_head=6, n_heads=4, seq_len=16, vocab_size=211,
    dropout_embedding=0.1, dropout_attention=0.1, dropout_residual=0.1,
)  # fmt: skip

LAYOUTS = [
    Layout(),
    Layout(tp=2, pp=2, micro_batch_size=2),
    Layout(dp=2, zero_stage=3, micro_batch_size=2),
    Layout(tp=2, dp=2, zero_stage=2, micro_batch_size=4),
    Layout(pp=2, dp=2, zero_stage=1, micro_batch_size=1, recompute=True),
    Layout(tp=2, dp=2, zero_stage=3, micro_batch_size=1),
    Layout(zero_stage=2, offload_optimizer=True),
    Layout(tp=4),
]
SLOW = (LAYOUTS[5], LAYOUTS[7])  # four ranks, eight times anew; as writers they are read by all


def config_of(layout: Layout, **train) -> RunConfig:
    config = spread_out(parity_config(MODEL), layout)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, train_steps=LAST, **train))


@dataclasses.dataclass(frozen=True)
class Leg:
    """What one rank reports of going on from a checkpoint, and the tensors as it held them there."""

    losses: list[float]
    skipped: list[bool]
    pieces: dict[str, list[LocalPart]]
    counters: dict[str, float]


def state_of(engine: Engine, step: int = SAVED) -> State:
    config = plain(engine.config)
    counters = engine.counters
    return State(step=step, samples=step * 8, tokens=step * 128, lr=0.1, counters=counters, config=config, data={})


def save(engine: Engine, run: Path, step: int = SAVED, **settings) -> None:
    saver = Saver(engine.masters, run, CheckpointConfig(**settings))
    saver.save(state_of(engine, step))
    saver.wait()


def steps(engine: Engine, first: int, last: int) -> list:
    return [engine.train_step(step, batches_of(engine.config, step, engine.mesh.data)) for step in range(first, last)]


def tensors_of(engine: Engine) -> dict[str, list[LocalPart]]:
    return {key: pieces_of(engine, key) for key in engine.masters.kept}


def write_leg(config: RunConfig, dp: int, target: Path) -> Leg:
    """Train to step SAVED, save there, train on to the end."""
    engine = start(config, dp)
    before = steps(engine, 0, SAVED)
    tensors = tensors_of(engine)
    save(engine, target)
    results = steps(engine, SAVED, LAST)
    return Leg([r.loss for r in results], [r.skipped for r in before + results], tensors, engine.counters)


def read_legs(config: RunConfig, dp: int, sources: list[Path]) -> list[Leg]:
    """From each of the checkpoints in turn train to the end."""
    engine, legs = start(config, dp), []
    for source in sources:
        assert engine.load(folders.find(source)).step == SAVED
        tensors = tensors_of(engine)
        results = steps(engine, SAVED, LAST)
        legs.append(Leg([r.loss for r in results], [r.skipped for r in results], tensors, engine.counters))
    return legs


def start(config: RunConfig, dp: int) -> Engine:
    if config.train.precision == "fp16":
        type(get_accelerator()).is_fp16_supported = lambda self: True  # slow here, but it computes
    return start_engine(config, dp)


def together(legs: list[Leg]) -> tuple[Leg, dict[str, Tensor]]:
    """The leg as rank 0 saw it, and the logical tensors at the checkpoint, from the memory of all ranks."""
    for leg in legs:
        assert leg.losses == legs[0].losses
    tensors = {}
    for key in legs[0].pieces:
        for name, value in merge([leg.pieces[key] for leg in legs]).items():
            tensors[name if key == WEIGHT else f"{name}.{key}"] = value
    return legs[0], tensors


def written(layout: Layout, target: Path, **train) -> tuple[Leg, dict[str, Tensor]]:
    return together(run_ranks(write_leg, layout.world_size, config_of(layout, **train), layout.dp, target))


def went_on(layout: Layout, sources: list[Path], **train) -> list[tuple[Leg, dict[str, Tensor]]]:
    ranks = run_ranks(read_legs, layout.world_size, config_of(layout, **train), layout.dp, sources)
    return [together(list(legs)) for legs in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[Layout, tuple[Leg, dict[str, Tensor], Path]]:
    """Uninterrupted runs that saved on their way, one in each layout."""
    found = {}
    for number, layout in enumerate(LAYOUTS):
        folder = tmp_path_factory.mktemp(f"layout{number}")
        found[layout] = (*written(layout, folder), folder)
    return found


def tensors_in(run: Path) -> dict[str, Tensor]:
    """The logical tensors of the latest checkpoint, put together from its files with json and safetensors alone."""
    folder = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().split()[0]
    whole: dict[str, Tensor] = {}
    for key, tensors in json.loads((folder / "index.json").read_text()).items():
        for name, logical in tensors.items():
            found = torch.full(logical["shape"], torch.nan)
            for piece in logical["pieces"]:
                with safe_open(folder / piece["file"], framework="pt") as file:
                    values = file.get_tensor(name)
                box = tuple(slice(s, s + n) for s, n in zip(piece["start"], piece["shape"], strict=True))
                assert found[box].isnan().all(), f"{name}: saved twice"
                found[box] = values
            assert not found.isnan().any(), f"{name}: saved with holes"
            whole[name if key == WEIGHT else f"{name}.{key}"] = found
    return whole


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_files_hold_the_logical_tensors(runs):
    """What other programs read: whole, unpadded, fp32, nothing twice; and sha256sum agrees with the hashes."""
    _, tensors, folder = runs[LAYOUTS[1]]
    assert_same_tensors(tensors_in(folder), tensors)
    assert tensors["embedding.tokens.weight"].shape == (211, 33)
    assert "head.tokens.weight" not in tensors  # tied: one tensor
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert all(tensors[f"{name}.exp_avg_sq"].max() > 0 for name in tensors if "exp_avg" not in name)
    found = folders.find(folder)
    assert {p.suffix for p in found.iterdir()} == {".safetensors", ".json", ""}
    check = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=found, capture_output=True, text=True
    )
    assert check.returncode == 0, check.stderr
    assert check.stdout.count(": OK") == len(list(found.iterdir())) - 1


@pytest.mark.timeout(300)
@pytest.mark.bad_input(47)
@pytest.mark.parametrize(
    "layout", [pytest.param(x, id=str(x), marks=[pytest.mark.slow] if x in SLOW else []) for x in LAYOUTS]
)
def test_every_layout_goes_on_from_every_layout(layout, runs):
    """All ordered pairs: bitwise the same tensors, and then the losses of the uninterrupted run."""
    legs = went_on(layout, [folder for _, _, folder in runs.values()])
    for (leg, loaded), (writer, (expected, tensors, _)) in zip(legs, runs.items(), strict=True):
        assert_same_tensors(loaded, tensors)
        if writer == layout:
            assert leg.losses == expected.losses
        else:
            assert leg.losses == pytest.approx(expected.losses, rel=1e-5), writer


def test_bf16_keeps_its_fp32_masters(tmp_path):
    layout, elsewhere = Layout(tp=2, zero_stage=1, micro_batch_size=4), Layout(dp=2, zero_stage=3, micro_batch_size=4)
    uninterrupted, tensors = written(layout, tmp_path, precision="bf16")
    weights = tensors["blocks.0.mlp.up.weight"]
    assert not torch.equal(weights, weights.bfloat16().float())
    ((resumed, loaded),) = went_on(layout, [tmp_path], precision="bf16")
    assert_same_tensors(loaded, tensors)
    assert resumed.losses == uninterrupted.losses
    ((other, loaded),) = went_on(elsewhere, [tmp_path], precision="bf16")
    assert_same_tensors(loaded, tensors)
    assert other.losses == pytest.approx(uninterrupted.losses, rel=4e-3)  # bf16 rounds to 2^-8


def test_fp16_resumes_with_its_loss_scale(tmp_path):
    """A step that overflowed moved nothing, Adam did not count it, and the scale grows again when it would have."""
    settings = {"fp16": {"initial_scale_power": 17, "hysteresis": 1, "loss_scale_window": 1}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    train = {"precision": "fp16", "deepspeed_config": str(tmp_path / "ds.json")}
    layout = Layout(dp=2, zero_stage=1)
    uninterrupted, tensors = written(layout, tmp_path / "a", **train)
    before, after = uninterrupted.skipped[:SAVED], uninterrupted.skipped[SAVED:]
    assert any(before) and any(after) and not all(before)  # it overflows, recovers, grows, overflows
    assert uninterrupted.counters["skipped_steps"] == sum(before) + sum(after)
    saved = read_state(folders.find(tmp_path / "a")).counters
    assert saved["skipped_steps"] == sum(before)
    grown = before.count(False) - 1  # by the steps after the first one that went well
    assert saved["cur_scale"] == 2.0 ** (17 - sum(before) + grown)
    ((resumed, loaded),) = went_on(layout, [tmp_path / "a"], **train)
    assert_same_tensors(loaded, tensors)
    assert resumed.skipped == after
    assert resumed.losses == uninterrupted.losses
    assert resumed.counters == uninterrupted.counters


def save_beside_training(config: RunConfig, dp: int, run: Path) -> tuple[list[float], list[float]]:
    """Save in the background while three more steps train; then load that, and train them again."""
    engine = start_engine(config, dp)
    steps(engine, 0, SAVED)
    saver = Saver(engine.masters, run, CheckpointConfig(async_save=True))
    saver.save(state_of(engine))
    beside = [r.loss for r in steps(engine, SAVED, LAST)]
    saver.wait()
    saved = saver.finished()
    assert saved is not None and saved.write_s > 0 and saver.finished() is None
    engine.load(folders.find(run))
    return beside, [r.loss for r in steps(engine, SAVED, LAST)]


@pytest.mark.parametrize("layout", [LAYOUTS[1], LAYOUTS[2], LAYOUTS[0]], ids=str)
def test_a_save_in_the_background_holds_the_step_it_began_at(layout, tmp_path):
    for beside, again in run_ranks(save_beside_training, layout.world_size, config_of(layout), layout.dp, tmp_path):
        assert beside == again


def fail_to_save(config: RunConfig, run: Path, async_save: bool, limit: int) -> tuple[str, list[str], str]:
    """Save step 1; then find the disk full on rank 1 at step 2. Returns the message, what is there, `latest`."""
    engine = start_engine(config, 2)
    saver = Saver(engine.masters, run, CheckpointConfig(async_save=async_save))
    saver.save(state_of(engine, 1))
    saver.wait()
    saver.finished()
    if engine.mesh.rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    message = ""
    try:
        saver.save(state_of(engine, 2))
        while not saver.failed:
            time.sleep(0.01)
        assert saver.finished() is None  # each rank knows by now, but not yet of the others that they do
        saver.wait()
    except UserError as error:
        message = str(error)
    dist.barrier()  # rank 0 clears up
    there = sorted(p.name for p in (run / "checkpoints").iterdir())
    return message, there, folders.find(run).name


@pytest.mark.parametrize("async_save", [False, True])
def test_a_full_disk_leaves_the_checkpoint_before_and_is_told_on_every_rank(tmp_path, async_save):
    layout = Layout(dp=2, zero_stage=1)
    for message, there, latest in run_ranks(fail_to_save, 2, config_of(layout), tmp_path, async_save, 4096):
        assert f"cannot write {tmp_path}/checkpoints/step-000002.tmp" in message and "make room" in message
        assert "\n" not in message
        assert there == ["latest", "step-000001"]
        assert latest == "step-000001"


def save_a_nan(config: RunConfig, run: Path) -> str:
    engine = start_engine(config, 1)
    save(engine, run, 1)
    if engine.mesh.model.rank == 1:
        next(n for n in engine.parameters if n.name == "blocks.1.mlp.up.weight").parameter.data[0, 0] = torch.nan
    with pytest.raises(UserError) as caught:
        save(engine, run, 2)
    return str(caught.value)


def test_a_nan_on_one_rank_is_not_saved(tmp_path):
    for message in run_ranks(save_a_nan, 2, config_of(Layout(tp=2)), tmp_path):
        assert message.startswith("weight of blocks.1.mlp.up.weight holds a NaN or Inf: not saved; ")
    assert folders.find(tmp_path).name == "step-000001"


class CrashError(Exception):
    """Stands for a kill: nothing cleans up after it."""


def crash_at_each_point(config: RunConfig, run: Path) -> list[tuple[str, str]]:
    """Break off saving step 2 at every change of a name; what --load finds then, and what is wrong with it."""
    engine, found = start_engine(config, 1), []
    replace = os.replace
    for stop_at in range(20):
        calls = iter(range(100))

        def stopping(*args, stop_at=stop_at, calls=calls) -> None:
            if next(calls) == stop_at:
                raise CrashError
            replace(*args)

        for step in (1, 2):  # the second time step 2 is there already, and is replaced
            save(engine, run, step)
        os.replace = stopping
        try:
            save(engine, run, 2)
            return found
        except CrashError:
            folder = find_whole(run, False, print)
            found.append((folder.name, ",".join(damage_of(folder))))
        finally:
            os.replace = replace
    raise AssertionError("the save never got through")


def test_a_crash_at_any_point_leaves_a_whole_checkpoint(tmp_path):
    """What is written before it gets its name, each rename, and the pointer: five points (durable.py's included)."""
    (found,) = run_ranks(crash_at_each_point, 1, config_of(Layout()), tmp_path)
    assert len(found) == 6
    assert {damage for _, damage in found} == {""}
    assert {name for name, _ in found} == {"step-000002", "step-000002.replaced"}


def shares(config: RunConfig, run: Path) -> tuple[float, float]:
    """Bytes that this rank holds at most while it saves and while it loads, each as a share of its fp32 parameters."""
    engine = start_engine(config, 4)
    save(engine, run, 1)
    mine = sum(p.stat().st_size for p in folders.find(run).glob(f"*-{engine.mesh.rank:05}-of-*"))
    whole = sum(
        n.parameter.ds_numel if hasattr(n.parameter, "ds_numel") else n.parameter.numel() for n in engine.parameters
    )
    return mine / (12 * whole), max(assign_writers(engine.parameters, engine.mesh).values())


def test_data_parallel_ranks_share_the_writing(tmp_path):
    found = run_ranks(shares, 4, config_of(Layout(dp=4, zero_stage=3, micro_batch_size=2)), tmp_path)
    assert sum(share for share, _ in found) == pytest.approx(1.0, abs=0.2)  # headers of the files: small tensors here
    assert max(share for share, _ in found) < 0.35


def load_damaged(config: RunConfig, run: Path, fallback: bool) -> tuple[str, bool]:
    """What a rank says of a run whose newest checkpoint has a flipped bit, and whether it is the one that speaks."""
    said = []
    mesh = start_engine(config, 2).mesh
    try:
        folder = find_whole(run, fallback, said.append if mesh.rank == 0 else lambda _: None)
    except RankError as error:
        return str(error), error.speaks
    return f"{folder.name}: {said}", mesh.rank == 0


def test_a_damaged_checkpoint_is_named_and_the_one_before_offered_or_taken(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[LAYOUTS[0]][2], run)
    shutil.copytree(run / "checkpoints" / "step-000003", run / "checkpoints" / "step-000002")
    file = run / "checkpoints" / "step-000003" / "exp_avg-00000-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1]))
    config = config_of(Layout(dp=2, zero_stage=1))
    (refused, speaks), (also_refused, other_speaks) = run_ranks(load_damaged, 2, config, run, False)
    assert refused == also_refused and (speaks, other_speaks) == (True, False)
    assert f"{file}: its contents have changed" in refused
    assert refused.endswith(f"; step 2 is whole: --load {run}@2, or add --load-fallback")
    (taken, _), (silent, _) = run_ranks(load_damaged, 2, config, run, True)
    assert taken.startswith("step-000002: ['note: ") and str(file) in taken
    assert silent == "step-000002: []"


def state_in_memory() -> State:
    config = plain(config_of(Layout()))
    return State(step=7, samples=56, tokens=56 * MODEL.seq_len, lr=0.1, counters={}, config=config, data={})


@pytest.mark.bad_input(48)
@pytest.mark.parametrize("change", [{"d_model": 66}, {"n_layers": 5}, {"vocab_size": 212}, {"tied_embeddings": False}])
def test_another_architecture_is_refused(change):
    config = config_of(Layout())
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    ((key, value),) = change.items()
    message = one_line(lambda: check_resumable(other, state_in_memory(), Path("run/checkpoints/step-000007")))
    assert f"model.{key}={getattr(MODEL, key)}" in message and f"wants {value}" in message


def test_what_may_change_may_change():
    config = config_of(LAYOUTS[1], precision="bf16")
    model = dataclasses.replace(config.model, dropout_attention=0.0)
    optim = dataclasses.replace(config.optim, lr=1.0)
    check_resumable(dataclasses.replace(config, model=model, optim=optim), state_in_memory(), Path("run"))


def test_a_checkpoint_from_before_a_setting_had_its_default():
    """n_kv_heads, block, optimizer … came later: what was trained before is what their defaults say."""
    config, at = config_of(Layout()), state_in_memory()
    older = {
        name: at.config["model"][name] for name in ("n_layers", "d_model", "d_head", "n_heads", "seq_len", "vocab_size")
    }
    train = {name: at.config["train"][name] for name in ("seed", "global_batch_size")}
    before = dataclasses.replace(at, config={"model": older, "train": train})
    check_resumable(config, before, Path("run/checkpoints/step-000007"))
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, block="parallel"))
    message = one_line(lambda: check_resumable(other, before, Path("run/checkpoints/step-000007")))
    assert "model.block=sequential, this run wants parallel" in message


def one_line(function) -> str:
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message
