"""Tables that agree and hashes that sha256sum confirms; damage of every kind is named; arbitrary bytes are refused."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from megagpt.checkpoint import integrity, pieces, state
from megagpt.checkpoint.integrity import damage_of, read_tables, write_tables
from megagpt.checkpoint.load import check_resumable, find_whole
from megagpt.checkpoint.state import State, read_state, state_json
from megagpt.config import ModelConfig, RunConfig, TrainConfig
from megagpt.errors import UserError
from megagpt.files import sha256_of
from megagpt.processes.agree import RankError
from megagpt.processes.local import run_ranks
from tests.checkpoint.written_checkpoint import MODEL, seal, state_of, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "run", 10)


def test_coreutils_agree_with_our_hashes(folder: Path):
    index, at = pieces.read_index(folder), read_state(folder)
    hashes = {p.name: sha256_of(p) for p in folder.glob("*.safetensors")}
    for name in ("index.json", "state.json", "SHA256SUMS"):
        (folder / name).unlink()
    write_tables(folder, index, at, hashes)
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == 8, done
    assert damage_of(folder) == [] and pieces.read_index(folder) == index and read_state(folder) == at
    assert read_tables(folder).keys() == {p.name for p in folder.iterdir()} - {"SHA256SUMS"}


def test_every_byte_is_compared_once(folder: Path):
    seen: list[int] = []
    assert damage_of(folder, seen.append) == []
    assert sum(seen) == sum(p.stat().st_size for p in folder.iterdir()) - (folder / "SHA256SUMS").stat().st_size


def cut(path: Path, n_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-n_bytes])


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def drop_line(folder: Path) -> None:
    lines = (folder / "SHA256SUMS").read_text().splitlines(keepends=True)
    (folder / "SHA256SUMS").write_text("".join(lines[:-1]))


def mix_steps(folder: Path) -> None:
    other = write_checkpoint(folder.parents[1], 11, latest=False)
    os.replace(other / "weight-00001-of-00002.safetensors", folder / "weight-00001-of-00002.safetensors")


def plant_pickle(folder: Path) -> None:
    # Would run `touch PWNED` if anything here unpickled it.
    payload = f"cposix\nsystem\n(S'touch {folder}/PWNED'\ntR.".encode()
    (folder / "weight-00000-of-00002.safetensors").write_bytes(payload)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def poison(folder: Path, key: str, name: str, value: float) -> None:
    """A number that nothing can be computed with, and the right hash of it."""
    path = folder / f"{key}-00001-of-00002.safetensors"
    tensors = load_file(path)
    tensors[name].flat[-1] = value
    save_file(tensors, path)
    seal(folder)


WEIGHTS = "weight-00000-of-00002.safetensors"
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "42 shard missing": (lambda f: (f / WEIGHTS).unlink(), f"{WEIGHTS}: missing"),
    "43 truncated": (lambda f: cut(f / WEIGHTS, 1), f"{WEIGHTS}: its contents have changed"),
    "44 one bit of a tensor": (lambda f: flip(f / WEIGHTS, -1), f"{WEIGHTS}: its contents have changed"),
    "44 one bit of the state": (lambda f: flip(f / "state.json", 30), "state.json: its contents have changed"),
    "44 one bit of the index": (lambda f: flip(f / "index.json", 30), "index.json: its contents have changed"),
    "44 one bit of a hash": (
        lambda f: flip(f / "SHA256SUMS", 3),
        "exp_avg-.*: its contents have changed|SHA256SUMS, line 1",
    ),
    "44 one bit of a name": (lambda f: flip(f / "SHA256SUMS", 68), "SHA256SUMS: cut short, or not in order"),
    "45 shards of two steps": (mix_steps, "weight-00001-of-00002.safetensors: its contents have changed"),
    "46 a pickle": (plant_pickle, f"{WEIGHTS}: its contents have changed"),
    "46 a sealed pickle": (lambda f: (plant_pickle(f), seal(f)), f"{WEIGHTS}: cannot be read .*load another"),
    "a line of the sums": (drop_line, "SHA256SUMS: has no weight-00001-of-00002.safetensors"),
    "no sums": (lambda f: (f / "SHA256SUMS").unlink(), "SHA256SUMS is missing: .* is no checkpoint, or an unfinished"),
    "sums without end of line": (lambda f: cut(f / "SHA256SUMS", 1), "SHA256SUMS: cut short"),
    "a pipe": (lambda f: pipe(f / WEIGHTS), f"{WEIGHTS}: cannot be read .not a regular file"),
    "a pipe as sums": (lambda f: pipe(f / "SHA256SUMS"), "SHA256SUMS: cannot be read .*not a regular file"),
    "a sealed NaN": (
        lambda f: poison(f, "weight", "head.norm.bias", float("nan")),
        "weight-00001-of-00002.safetensors: weight of head.norm.bias holds 1 NaN or Inf",
    ),
    "a sealed Inf": (
        lambda f: poison(f, "exp_avg", "blocks.1.mlp.up.weight", np.float32("inf")),
        "exp_avg-00001-of-00002.safetensors: exp_avg of blocks.1.mlp.up.weight holds 1 NaN or Inf",
    ),
    "a sealed negative square": (
        lambda f: poison(f, "exp_avg_sq", "head.norm.bias", -1e-20),
        "exp_avg_sq-00001-of-00002.safetensors: exp_avg_sq of head.norm.bias holds 1 negative squares",
    ),
    "sealed without a shard": (
        lambda f: ((f / WEIGHTS).unlink(), seal(f)),
        f"SHA256SUMS: has no {WEIGHTS}; the checkpoint is damaged, load another",
    ),
}


@pytest.mark.bad_input(42, 43, 44, 45, 46)
@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_found_and_its_file_named(folder: Path, case: str):
    assert damage_of(folder) == []
    damage, message = DAMAGE[case]
    damage(folder)
    found = damage_of(folder)
    assert len(found) == 1 and "\n" not in found[0]
    with pytest.raises(UserError, match=f"{folder}/({message})"):
        raise UserError(found[0])
    assert not (folder / "PWNED").exists()


def looked_for(run: Path, fallback: bool) -> str:
    said: list[str] = []
    try:
        return f"{find_whole(run, fallback, said.append).name} {said}"
    except RankError as error:
        return str(error)


def test_numbers_that_are_none_are_damage_to_whoever_loads(folder: Path):
    """The remedy is another checkpoint, not the same one again."""
    run = folder.parents[1]
    poison(write_checkpoint(run, 20), "weight", "head.norm.bias", float("nan"))
    (refused,), (taken,) = (run_ranks(looked_for, 1, run, fallback) for fallback in (False, True))
    assert "weight of head.norm.bias holds 1 NaN or Inf" in refused and f"--load {run}@10" in refused
    assert taken.startswith("step-000010 ['note: ") and "head.norm.bias" in taken


def test_all_damaged_files_are_named(folder: Path):
    for name in (WEIGHTS, "state.json"):
        flip(folder / name, 20)
    assert [line.split(": ")[0] for line in damage_of(folder)] == [f"{folder}/state.json", f"{folder}/{WEIGHTS}"]


@given(st.binary() | st.text().map(str.encode))
def test_arbitrary_bytes_are_refused_and_nothing_worse(data: bytes):
    with TemporaryDirectory() as name:
        folder = Path(name)
        for file, read in {
            "SHA256SUMS": integrity.read_sums,
            "state.json": read_state,
            "index.json": pieces.read_index,
        }.items():
            (folder / file).write_bytes(data)
            with pytest.raises(UserError, match=file):
                read(folder)
        with pytest.raises(UserError, match="SHA256SUMS"):
            integrity.read_tables(folder)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
VALID = json.loads(state_json(state_of()))
INDEX = {"weight": {"x": {"shape": [2], "pieces": [{"file": "f", "start": [0], "shape": [2]}]}}}


@given(st.sampled_from(sorted(VALID)), anything)
def test_a_state_with_anything_in_a_field_is_read_or_refused(field: str, value: object):
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "state.json").write_text(json.dumps(VALID | {field: value}))
        try:
            at = read_state(folder)
        except UserError as error:
            assert str(error).startswith(f"{folder}/state.json: ")
        else:
            assert isinstance(at, State) and json.loads(state_json(at)) == VALID | {field: value}


@given(st.sampled_from(["weight", "x", "shape", "pieces", "file", "start", "piece shape"]), anything)
def test_an_index_with_anything_in_a_place_is_read_or_refused(place: str, value: object):
    index = json.loads(json.dumps(INDEX))
    tensor = index["weight"]["x"]
    holder, key = {
        "weight": (index, "weight"), "x": (index["weight"], "x"), "shape": (tensor, "shape"),
        "pieces": (tensor, "pieces"), "piece shape": (tensor["pieces"][0], "shape"),
    }.get(place, (tensor["pieces"][0], place))  # fmt: skip
    holder[key] = value
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "index.json").write_text(json.dumps(index))
        try:
            assert json.loads(pieces.index_json(pieces.read_index(folder))) == index
        except UserError as error:
            assert str(error).startswith(f"{folder}/index.json: ")


@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(0, 1e3), st.lists(st.integers(0, 2**60)))
def test_a_state_comes_back_bit_for_bit(lr: float, loss: float, skipped: list[int]):
    at = state_of(
        7, lr=lr, validation_loss=loss, counters={"skipped_steps": 0.0, "cur_scale": 2.0**40}, skipped_steps=skipped
    )
    with TemporaryDirectory() as name:
        (Path(name) / "state.json").write_text(state_json(at))
        back = read_state(Path(name))
    assert (back.lr.hex(), back.skipped_steps) == (lr.hex(), skipped)
    assert state_json(back) == state_json(at)


WRONG: list[tuple[str, object, str]] = [
    ("counters", {"skipped_steps": "0"}, "counters.skipped_steps: Input should be a valid number"),
    ("counters", {"skipped_steps": -1}, "a counter is not what a run counts"),
    ("counters", {"skipped_steps": 0.5}, "a counter is not what a run counts"),
    ("counters", {"skipped_steps": 9}, "a counter is not what a run counts"),
    ("counters", {"skipped_steps": 0, "cur_scale": 0.0}, "a counter is not what a run counts"),
    ("counters", {"cur_scale": 1.0}, "a counter is not what a run counts"),
    ("guard", {"history": {"losses": ["1"]}}, "guard.history.losses.0: Input should be a valid number"),
    ("guard", {"history": [1]}, "guard.history: Input should be an object"),
    ("guard", {"n_bad": 1.5}, "guard.n_bad: Input should be a valid integer"),
    ("noise_scale", {"signal": None}, "noise_scale.signal: Input should be a valid number"),
    ("noise_scale", {"other": 1.0}, "noise_scale.other: Extra inputs"),
    ("config", {"model": []}, "config.model: Input should be an object"),
    ("data", {"tokenizer_sha256": 3}, "data.tokenizer_sha256: Input should be a valid string"),
    ("lr", 1e400, "it holds Infinity|lr: "),
    ("step", True, "step: Input should be a valid integer"),
]


@pytest.mark.parametrize(("field", "value", "words"), WRONG, ids=[f"{field} {value}" for field, value, _ in WRONG])
def test_wrong_types_are_found_when_it_is_read(tmp_path: Path, field: str, value: object, words: str):
    (tmp_path / "state.json").write_text(json.dumps(VALID | {field: value}))
    with pytest.raises(UserError, match=words):
        read_state(tmp_path)


def test_numbers_that_are_none_are_not_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        state_json(state_of(validation_loss=float("nan")))


def test_another_format_is_named(tmp_path: Path):
    (tmp_path / "state.json").write_text(json.dumps(VALID | {"format": 3}))
    with pytest.raises(UserError, match="format 3; this version reads format 2"):
        state.read_state(tmp_path)


def test_what_a_run_that_goes_on_must_keep():
    folder, config = Path("runs/a/checkpoints/step-000001"), RunConfig(model=MODEL)
    check_resumable(config, state_of(), folder)
    check_resumable(replace(config, model=replace(MODEL, dropout_residual=0.5)), state_of(), folder)
    wider: ModelConfig = replace(MODEL, d_model=32)
    seeded = replace(config, train=TrainConfig(seed=1))
    for changed, name in ((replace(config, model=wider), "model.d_model=16"), (seeded, "train.seed=1234")):
        with pytest.raises(
            UserError, match=f"trained with {name}, this run wants .*; take .*--config runs/a/config.yaml"
        ):
            check_resumable(changed, state_of(), folder)  # 48: another architecture
    # The batch may be another one from here on, not before: each sample is read once.
    at = state_of(7, samples=7 * 8, tokens=7 * 8 * MODEL.seq_len)
    check_resumable(replace(config, train=TrainConfig(batch_steps="8@1,12@8", global_batch_size=12)), at, folder)
    for settings in ({"batch_steps": "8@1,12@7"}, {}):
        train = TrainConfig(global_batch_size=12, **settings)
        with pytest.raises(UserError, match=r"read 56 samples, .* would have read \d+ samples.*batch-steps 8@1,12@8"):
            check_resumable(replace(config, train=train), at, folder)
    with pytest.raises(UserError, match=r"keep train\.global_batch_size, its ramp and that of seq_len$"):
        check_resumable(replace(config, train=TrainConfig(global_batch_size=4)), at, folder)  # no batch_steps shrink
    shorter = TrainConfig(seq_len_start=4, seq_len_warmup_steps=3)
    with pytest.raises(UserError, match=r"read 56 samples, .* tokens .* would have read 56 samples"):
        check_resumable(replace(config, train=shorter), at, folder)
    # Imported weights have seen no sample: any order of samples may follow.
    imported = state_of(0, samples=0, origin="import of hf/")
    check_resumable(seeded, imported, folder)
    with pytest.raises(UserError, match="is a mean of 3: weights without the optimizer's moments"):
        check_resumable(config, state_of(3, origin="mean of 3"), folder)
