"""Checkpoints from checkpoints: bitwise the same in other files, means in float64, in bounded memory, all or none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file

from megagpt.checkpoint import chunks, rewrite
from megagpt.checkpoint.chunks import row_boxes, write_chunks
from megagpt.checkpoint.integrity import damage_of
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.state import read_state
from megagpt.errors import UserError
from tests.checkpoint.written_checkpoint import weights_and_moments, write_checkpoint


def merged(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint, put together with the library safetensors alone."""
    with Reader(folder) as reader:
        index = reader.index
    files = {path.name: load_file(path) for path in folder.glob("*.safetensors")}
    whole = {}
    for key, tensors in index.items():
        for name, logical in tensors.items():
            values = np.full(logical.shape, np.nan, np.float32)
            for piece in logical.pieces:
                box = tuple(slice(s, s + n) for s, n in zip(piece.start, piece.shape, strict=True))
                values[box] = files[piece.file][name]
            whole[f"{key}/{name}"] = values
    return whole


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name, values in a.items():
        assert values.tobytes() == b[name].tobytes() and values.shape == b[name].shape, name


@pytest.mark.parametrize("n_files", [1, 3, 37])
def test_reshaped_tensors_are_bitwise_the_same(tmp_path: Path, n_files: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 300)  # so that there are several to a tensor
    source, out, seen = write_checkpoint(tmp_path / "run", 5), tmp_path / "out", []
    rewrite.reshape(source, out, n_files, seen.append)
    assert_same(merged(out), merged(source))
    assert damage_of(out) == [] and read_state(out) == read_state(source)
    assert len(list(out.glob("*.safetensors"))) == 3 * n_files
    assert sum(seen) == sum(values.nbytes for values in merged(source).values())
    sizes = [path.stat().st_size for path in out.glob("weight-*.safetensors")]
    assert n_files > 3 or max(sizes) < 1.1 * min(sizes) + 1000  # of 37 rows and more there are few tensors


@pytest.mark.parametrize("n_files", [0, 65])
def test_more_files_than_rows_are_refused(tmp_path: Path, n_files: int):
    source = write_checkpoint(tmp_path / "run")
    with pytest.raises(UserError, match=f"--files {n_files}: the largest tensor has 64 rows; give 1 to 64"):
        rewrite.reshape(source, tmp_path / "out", n_files)
    assert not (tmp_path / "out").exists()


def test_the_mean_is_summed_in_float64(tmp_path: Path):
    # In fp32 the small ones would vanish beside the large one, which cancels.
    values = [np.float32([1e8, 1.0]), np.float32([3.0, 2.0]), np.float32([-1e8, 4.0])]
    run = tmp_path / "run"
    sources = [write_checkpoint(run, i, {"weight": {"x": v}, "exp_avg": {"x": v}}) for i, v in enumerate(values)]
    rewrite.average(sources, tmp_path / "out")
    expected = np.stack(values).astype(np.float64).mean(0).astype(np.float32)
    np.testing.assert_array_equal(expected, np.float32([1.0, 7 / 3]))
    assert_same(merged(tmp_path / "out"), {"weight/x": expected})
    at = read_state(tmp_path / "out")
    assert (at.step, at.validation_loss) == (2, None)
    assert at.origin == "mean of 3 (run/step-000000, run/step-000001, run/step-000002)"


def test_the_mean_of_one_is_itself(tmp_path: Path):
    source = write_checkpoint(tmp_path / "run")
    rewrite.average([source], tmp_path / "out")
    assert_same(merged(tmp_path / "out"), {n: v for n, v in merged(source).items() if n.startswith("weight/")})


def test_other_architectures_have_no_mean(tmp_path: Path):
    one = write_checkpoint(tmp_path / "a", tensors={"weight": {"x": np.zeros((2, 3), np.float32)}})
    for name, values, said in (
        ("b", {"x": np.zeros(6, np.float32)}, r"x of shape \(6,\)"),
        ("c", {}, "x of shape None"),
    ):
        other = write_checkpoint(tmp_path / name, tensors={"weight": values})
        with pytest.raises(UserError, match=rf"{name}/check.* has {said}, .* of \(2, 3\); only .* of one architecture"):
            rewrite.average([other, one], tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("out")] == []


def no_space(*args: object) -> None:
    raise OSError(28, "No space left on device")


def test_what_exists_is_left_alone_and_what_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write_checkpoint(tmp_path / "run")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists; give another --out, or remove it"):
        rewrite.reshape(source, tmp_path / "out", 1)
    (source / "exp_avg-00001-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match=r"exp_avg-00001-of-00002.safetensors: cannot be read"):
        rewrite.reshape(source, tmp_path / "new" / "out", 1)
    assert list((tmp_path / "new").iterdir()) == []
    monkeypatch.setattr(rewrite, "write_tables", no_space)
    with pytest.raises(UserError, match=r"cannot write .*full \(No space left on device\); make room there or give"):
        rewrite.average([write_checkpoint(tmp_path / "other")], tmp_path / "new" / "full")
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(UserError, match=r"cannot write /proc/out \(No such file or directory\); make room there or"):
        rewrite.reshape(source, Path("/proc/out"), 1)


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=4), st.integers(4, 60))
def test_a_file_written_by_chunks_is_what_safetensors_reads(shapes: list[list[int]], chunk_bytes: int):
    random = np.random.default_rng(0)
    tensors = {f"é{i}": random.standard_normal(shape).astype(np.float32) for i, shape in enumerate(shapes)}

    def chunks_of(name: str):
        for start, shape in row_boxes(tensors[name].shape):
            yield tensors[name][tuple(slice(s, s + n) for s, n in zip(start, shape, strict=True))]

    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        patch.setattr(chunks, "CHUNK_BYTES", chunk_bytes)
        write_chunks(path, {n: t.shape for n, t in tensors.items()}, chunks_of, {"format": "pt"})
        read = load_file(path)
        with safe_open(path, framework="numpy") as file:
            assert file.metadata() == {"format": "pt"}
    assert_same(read, tensors)


MEASURED = """
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from megagpt.checkpoint import chunks, pieces, rewrite

def peak():  # in KiB; ru_maxrss would count the parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

pieces.MAPPED_BYTES = chunks.CHUNK_BYTES = 4 << 20
before, sources, out = peak(), [Path(p) for p in sys.argv[2:-1]], Path(sys.argv[-1])
rewrite.reshape(sources[0], out, 1) if sys.argv[1] == "reshape" else rewrite.average(sources, out)
print(peak() - before)
"""


@pytest.mark.parametrize("operation", ["reshape", "average"])
def test_memory_is_bounded(tmp_path: Path, operation: str):
    tensors = {"weight": {"x": np.zeros((1 << 20, 24), np.float32)}}  # 96 MiB, in one tensor
    sources = [write_checkpoint(tmp_path / "run", step, tensors) for step in (1, 2)]
    command = [sys.executable, "-c", MEASURED, operation, *sources, tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 48 << 10


def test_a_small_gpt_is_what_the_tests_say(tmp_path: Path):
    source = write_checkpoint(tmp_path / "run")
    expected = {f"{key}/{n}": v for key, named in weights_and_moments(seed=3).items() for n, v in named.items()}
    assert_same(merged(source), expected)
