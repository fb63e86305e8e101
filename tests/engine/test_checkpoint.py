"""Checkpoints: the same tensors and the same losses, whatever layout wrote and whatever layout reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from megagpt.engine.storage import MOMENTS, WEIGHT, State
from safetensors import safe_open
from torch import Tensor

from megagpt.config import ModelConfig, RunConfig
from megagpt.engine import checkpoint, storage
from megagpt.engine.masters import read_counters
from megagpt.errors import UserError
from megagpt.parallel.local import run_ranks
from megagpt.parity import Layout, merge, parity_config, spread_out
from megagpt.parity_rank import Piece, batches_of, pieces_of, start_engine

SAVED, LAST = 3, 6
# 33 and 211 are divided by no axis: shards of ZeRO and of the vocabulary are uneven.
MODEL = ModelConfig(
    n_layers=4, d_model=33, d_head=6, n_heads=4, seq_len=16, vocab_size=211,
    dropout_embedding=0.1, dropout_attention=0.1, dropout_residual=0.1,
)  # fmt: skip

FIRST = Layout(tp=2, pp=2, micro_batch_size=2)
RING = [
    Layout(dp=2, zero_stage=3, micro_batch_size=2),
    Layout(tp=2, dp=2, zero_stage=2, micro_batch_size=4),
    Layout(pp=2, dp=2, zero_stage=1, micro_batch_size=1, recompute=True),
    Layout(tp=2, dp=2, zero_stage=3, micro_batch_size=1),
    Layout(zero_stage=2, offload_optimizer=True),
    Layout(),
    FIRST,
]


def config_of(layout: Layout, **train) -> RunConfig:
    config = spread_out(parity_config(MODEL), layout)
    return dataclasses.replace(config, train=dataclasses.replace(config.train, train_steps=LAST, **train))


@dataclasses.dataclass(frozen=True)
class Leg:
    """What one rank of a run reports: of the steps after the checkpoint, and the tensors as it held them there."""

    losses: list[float]
    skipped: list[bool]
    pieces: dict[str, list[Piece]]
    counters: dict[str, float]


def run_leg(config: RunConfig, dp: int, source: Path | None, target: Path) -> Leg:
    """Get to step SAVED by loading, or by training; save there; train on to the end."""
    if config.train.precision == "fp16":
        type(get_accelerator()).is_fp16_supported = lambda self: True  # slow here, but it computes
    engine = start_engine(config, dp)
    if source is None:
        skipped = [engine.train_step(step, batches_of(config, step, engine.mesh.data)).skipped for step in range(SAVED)]
    else:
        assert checkpoint.load(engine, storage.find(source)).step == SAVED
        skipped = []
    pieces = {key: pieces_of(engine, key) for key in (WEIGHT, *MOMENTS)}
    state = State(
        step=SAVED,
        samples=SAVED * 8,
        tokens=SAVED * 128,
        counters=read_counters(engine),
        config=dataclasses.asdict(config),
        data={},
    )
    checkpoint.save(engine, target, state)
    results = [engine.train_step(step, batches_of(config, step, engine.mesh.data)) for step in range(SAVED, LAST)]
    counters = read_counters(engine)
    engine.close()
    return Leg([r.loss for r in results], skipped + [r.skipped for r in results], pieces, counters)


def run(layout: Layout, source: Path | None, target: Path, **train) -> tuple[Leg, dict[str, Tensor]]:
    """The leg as rank 0 saw it, and the logical tensors at the checkpoint, from the memory of all ranks."""
    legs = run_ranks(run_leg, layout.world_size, config_of(layout, **train), layout.dp, source, target)
    for leg in legs:
        assert leg.losses == legs[0].losses
    tensors = {}
    for key in (WEIGHT, *MOMENTS):
        for name, value in merge([leg.pieces[key] for leg in legs]).items():
            tensors[name if key == WEIGHT else f"{name}.{key}"] = value
    return legs[0], tensors


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> tuple[Leg, dict[str, Tensor], Path]:
    """An uninterrupted run that saved on its way."""
    folder = tmp_path_factory.mktemp("first")
    return *run(FIRST, None, folder), folder


def tensors_in(run_dir: Path) -> dict[str, Tensor]:
    """The logical tensors of the latest checkpoint, put together from its files with the library safetensors alone."""
    whole: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    files = sorted((storage.find(run_dir) / "tensors").glob("*.safetensors"))
    sizes = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118  # not a dictionary
                piece, start = file.get_tensor(name), places[name]["saved_offsets"]
                sizes.setdefault(name, []).append((start, piece))
    for name, pieces in sizes.items():
        shape = [max(s[d] + p.shape[d] for s, p in pieces) for d in range(pieces[0][1].dim())]
        whole[name] = torch.full(shape, torch.nan)
        filled[name] = 0
        for start, piece in pieces:
            whole[name][tuple(slice(s, s + n) for s, n in zip(start, piece.shape, strict=True))] = piece
            filled[name] += piece.numel()
        assert filled[name] == whole[name].numel(), f"{name}: saved twice, or with holes"
    return whole


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_files_hold_the_logical_tensors(first):
    """What other programs read: whole, unpadded, fp32, in safetensors, nothing twice, and nothing else but JSON."""
    _, tensors, folder = first
    assert_same_tensors(tensors_in(folder), tensors)
    assert tensors["embedding.tokens.weight"].shape == (211, 33)
    assert "head.tokens.weight" not in tensors  # tied: one tensor
    assert all(t.dtype == torch.float32 for t in tensors.values())
    assert all(tensors[f"{name}.exp_avg_sq"].max() > 0 for name in tensors if "exp_avg" not in name)
    suffixes = {p.suffix for p in storage.find(folder).rglob("*") if p.is_file()}
    assert suffixes == {".safetensors", ".json"}
    assert (folder / "checkpoints" / "latest").read_text() == "step-000003"


def test_around_a_ring_of_layouts(first, tmp_path):
    """Each layout loads what the one before wrote, writes it again, and goes on as if nothing had happened."""
    uninterrupted, tensors, source = first
    for number, layout in enumerate(RING):
        target = tmp_path / str(number)
        leg, loaded = run(layout, source, target)
        assert_same_tensors(loaded, tensors)
        if layout == FIRST:
            assert leg.losses == uninterrupted.losses
        else:
            assert leg.losses == pytest.approx(uninterrupted.losses, rel=1e-5), layout
        source = target
    assert_same_tensors(tensors_in(source), tensors)


def test_bf16_keeps_its_fp32_masters(tmp_path):
    layout = Layout(tp=2, zero_stage=1, micro_batch_size=4)
    uninterrupted, tensors = run(layout, None, tmp_path / "a", precision="bf16")
    weights = tensors["blocks.0.mlp.up.weight"]
    assert not torch.equal(weights, weights.bfloat16().float())
    resumed, loaded = run(layout, tmp_path / "a", tmp_path / "b", precision="bf16")
    assert_same_tensors(loaded, tensors)
    assert resumed.losses == uninterrupted.losses
    elsewhere, loaded = run(
        Layout(dp=2, zero_stage=3, micro_batch_size=4), tmp_path / "b", tmp_path / "c", precision="bf16"
    )
    assert_same_tensors(loaded, tensors)
    assert elsewhere.losses == pytest.approx(uninterrupted.losses, rel=4e-3)  # bf16 rounds to 2^-8


def test_fp16_resumes_with_its_loss_scale(tmp_path):
    """A step that overflowed moved nothing, Adam did not count it, and the scale grows again when it would have."""
    settings = {"fp16": {"initial_scale_power": 18, "hysteresis": 1, "loss_scale_window": 2}}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    train = {"precision": "fp16", "deepspeed_config": str(tmp_path / "ds.json")}
    layout = Layout(dp=2, zero_stage=1)
    uninterrupted, tensors = run(layout, None, tmp_path / "a", **train)
    before, after = uninterrupted.skipped[:SAVED], uninterrupted.skipped[SAVED:]
    assert any(before) and any(after) and not all(before)  # it overflows, recovers, grows, overflows
    assert uninterrupted.counters["skipped_steps"] == sum(before) + sum(after)
    saved = storage.read_state(storage.find(tmp_path / "a")).counters
    assert saved["skipped_steps"] == sum(before)
    assert saved["cur_scale"] == 2.0 ** (18 - sum(before))
    resumed, loaded = run(layout, tmp_path / "a", tmp_path / "b", **train)
    assert_same_tensors(loaded, tensors)
    assert resumed.skipped == after
    assert resumed.losses == uninterrupted.losses
    assert resumed.counters == uninterrupted.counters


def save_and_break_off(config: RunConfig, run_dir: Path) -> list[str]:
    """Save step 1; then fail in the middle of saving step 2. Returns what stood there when `latest` was written."""
    engine, seen = start_engine(config, 1), []

    def spy(path: Path, text: str) -> None:
        if path.name == storage.LATEST:
            seen.extend(sorted(p.name for p in (path.parent / text).iterdir()))
        replace_text(path, text)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    replace_text, checkpoint.replace_text = checkpoint.replace_text, spy
    state = State(step=1, samples=8, tokens=8, counters={}, config=dataclasses.asdict(config), data={})
    checkpoint.save(engine, run_dir, state)
    checkpoint.write_state = fail
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(engine, run_dir, dataclasses.replace(state, step=2))
    engine.close()
    return seen


def test_latest_moves_last_and_a_broken_save_leaves_the_one_before(tmp_path):
    (seen,) = run_ranks(save_and_break_off, 1, config_of(Layout()), tmp_path)
    assert seen == ["state.json", "tensors"]
    assert storage.find(tmp_path).name == "step-000001"
    assert {p.name for p in (tmp_path / "checkpoints").iterdir()} == {"latest", "step-000001", "step-000002.tmp"}


def some_run(folder: Path) -> Path:
    """A run folder with a checkpoint of step 7 as far as its JSON goes."""
    state = State(step=7, samples=56, tokens=56, counters={}, config=dataclasses.asdict(config_of(Layout())), data={})
    checkpoint_dir = folder / "checkpoints" / "step-000007"
    checkpoint_dir.mkdir(parents=True)
    storage.write_state(checkpoint_dir, state)
    storage.replace_text(checkpoint_dir.parent / "latest", "step-000007")
    return folder


def test_find_takes_a_run_or_one_of_its_checkpoints(tmp_path):
    folder = some_run(tmp_path) / "checkpoints" / "step-000007"
    assert storage.find(tmp_path) == storage.find(str(folder)) == folder


@pytest.mark.parametrize("name", ["", "\n", "../step-000007", "step-000008", "/tmp", ".", ".."])
def test_a_bad_latest_is_refused(tmp_path, name):
    (some_run(tmp_path) / "checkpoints" / "latest").write_text(name)
    message = one_line(lambda: storage.find(tmp_path))
    assert "latest names" in message
    assert message.endswith(f"give --load one of {tmp_path}/checkpoints/step-000007")


def test_a_missing_checkpoint_is_named(tmp_path):
    assert f"no checkpoint in {tmp_path}" in one_line(lambda: storage.find(tmp_path))
    (some_run(tmp_path) / "checkpoints" / "latest").unlink()
    assert "checkpoints/latest" in one_line(lambda: storage.find(tmp_path))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 99}', '{"format": 1, "step": 7}', "\xff", "null"])
def test_a_damaged_state_is_named(tmp_path, text):
    folder = storage.find(some_run(tmp_path))
    (folder / "state.json").write_bytes(text.encode("latin-1"))
    assert f"{folder}/state.json" in one_line(lambda: storage.read_state(folder))


@pytest.mark.parametrize("change", [{"d_model": 66}, {"n_layers": 5}, {"vocab_size": 212}, {"tied_embeddings": False}])
def test_another_architecture_is_refused(tmp_path, change):
    folder = storage.find(some_run(tmp_path))
    config = config_of(Layout())
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, **change))
    ((key, value),) = change.items()
    message = one_line(lambda: storage.check_resumable(other, storage.read_state(folder), folder))
    assert f"model.{key}={getattr(MODEL, key)}" in message and f"wants {value}" in message


def test_what_may_change_may_change(tmp_path):
    folder = storage.find(some_run(tmp_path))
    config = config_of(FIRST, precision="bf16")
    model = dataclasses.replace(config.model, dropout_attention=0.0)
    optim = dataclasses.replace(config.optim, lr=1.0)
    storage.check_resumable(dataclasses.replace(config, model=model, optim=optim), storage.read_state(folder), folder)


def one_line(function) -> str:
    with pytest.raises(UserError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    return message
