"""Any box of a tensor, from any pieces, against numpy's own slices and the library safetensors alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from megagpt.checkpoint import pieces
from megagpt.checkpoint.pieces import Logical, Piece, Reader, TensorIndex
from megagpt.errors import UserError
from tests.checkpoint.written_checkpoint import seal, write_checkpoint


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[slice, ...]], tuple[slice, ...]]:
    """A tensor, boxes that tile it (cut along random planes, again and again), and a box to read."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    boxes = [tuple(slice(0, n) for n in shape)]
    for _ in range(draw(st.integers(0, 4))):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, len(shape) - 1))
        at = draw(st.integers(box[dim].start, box[dim].stop))
        for part in (slice(box[dim].start, at), slice(at, box[dim].stop)):
            if part.start < part.stop:
                boxes.append((*box[:dim], part, *box[dim + 1 :]))
    ends = [sorted(draw(st.lists(st.integers(0, n), min_size=2, max_size=2))) for n in shape]
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    return values, boxes, tuple(slice(*pair) for pair in ends)


@given(cut_tensors())
def test_any_box_of_any_cut_is_what_numpy_slices(case):
    values, boxes, wanted = case
    with TemporaryDirectory() as name:
        folder = Path(name)
        parts: list[TensorIndex] = []
        for rank, box in enumerate(boxes):
            file = pieces.file_name("weight", rank, len(boxes))
            pieces.write_pieces(folder / file, {"x": np.ascontiguousarray(values[box])})
            np.testing.assert_array_equal(load_file(folder / file)["x"], values[box])
            piece = Piece(file, tuple(s.start for s in box), values[box].shape)
            parts.append({"weight": {"x": Logical(values.shape, (piece,))}})
        (folder / pieces.NAME).write_text(pieces.index_json(pieces.merge(reversed(parts))))
        with Reader(folder) as reader:
            reader.check()
            start = tuple(s.start for s in wanted)
            got = reader.read("weight", "x", start, values[wanted].shape)
            np.testing.assert_array_equal(got, values[wanted])
            np.testing.assert_array_equal(reader.read("weight", "x"), values)
            reader.close()
            np.testing.assert_array_equal(reader.read("weight", "x"), values)


@given(cut_tensors(), st.data())
def test_a_cut_with_a_hole_or_an_overlap_is_refused(case, data):
    values, boxes, _ = case
    cut = [Piece(f"{i}", tuple(s.start for s in b), tuple(s.stop - s.start for s in b)) for i, b in enumerate(boxes)]
    assert tiles(values.shape, cut)
    number = data.draw(st.integers(0, len(cut) - 1))
    dim = data.draw(st.integers(0, values.ndim - 1))
    moved, grown = list(cut[number].start), list(cut[number].shape)
    moved[dim] += 1
    grown[dim] += 1
    for changed in ([], [Piece("x", tuple(moved), cut[number].shape)], [Piece("x", cut[number].start, tuple(grown))]):
        assert not tiles(values.shape, [*cut[:number], *changed, *cut[number + 1 :]])
    assert not tiles(values.shape, [*cut, cut[number]])


def tiles(shape: tuple[int, ...], cut: list[Piece]) -> bool:
    """What `merge` says, which must be what counting every element says."""
    counts = np.zeros([n + 2 for n in shape], int)
    for piece in cut:
        counts[tuple(slice(s, s + n) for s, n in zip(piece.start, piece.shape, strict=True))] += 1
    inside = counts[tuple(slice(0, n) for n in shape)]
    expected = bool((inside == 1).all()) and int(counts.sum()) == int(np.prod(shape))
    try:
        pieces.merge([{"weight": {"x": Logical(shape, tuple(cut))}}])
    except ValueError:
        assert not expected
        return False
    assert expected
    return True


def test_two_pieces_of_a_tensor_are_not_in_one_file():
    # They would have one name there: the second would be read for the first.
    with pytest.raises(ValueError, match="do not make up"):
        pieces.merge([{"weight": {"x": Logical((2,), (Piece("f", (0,), (1,)), Piece("f", (1,), (1,))))}}])


def test_scalars_and_empty_tensors(tmp_path: Path):
    tensors = {"scalar": np.array(2.5, np.float32), "none": np.zeros((0, 3), np.float32)}
    pieces.write_pieces(tmp_path / "f", tensors)
    index: TensorIndex = {
        "weight": {n: Logical(t.shape, (Piece("f", (0,) * t.ndim, t.shape),)) for n, t in tensors.items()}
    }
    (tmp_path / pieces.NAME).write_text(pieces.index_json(index))
    assert pieces.read_index(tmp_path) == index
    with Reader(tmp_path) as reader:
        assert reader.read("weight", "scalar") == np.float32(2.5)
        assert reader.read("weight", "none").shape == (0, 3)


READ_ALL = """
import sys
from pathlib import Path
from megagpt.checkpoint import pieces

def peak():  # in KiB; ru_maxrss would count the parent's
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

pieces.MAPPED_BYTES, before = 8 << 20, peak()
with pieces.Reader(Path(sys.argv[1])) as reader:
    for name in reader.index["weight"]:
        reader.read("weight", name)
print(peak() - before)
"""


def test_reading_lets_go_of_what_it_has_read(tmp_path: Path):
    tensors = {"weight": {f"t{i}": np.zeros((1 << 18, 8), np.float32) for i in range(10)}}  # 10 x 8 MiB
    folder = write_checkpoint(tmp_path, tensors=tensors)
    done = subprocess.run([sys.executable, "-c", READ_ALL, folder], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 44 << 10  # twice 8 mapped, and 8 that come while 8 go


BROKEN: dict[str, Any] = {
    "no object": [],
    "key": {"weight": []},
    "tensor": {"weight": {"x": 1}},
    "shape": {"weight": {"x": {"shape": [1.5], "pieces": []}}},
    "negative": {"weight": {"x": {"shape": [-1], "pieces": []}}},
    "boolean": {"weight": {"x": {"shape": [True], "pieces": [{"file": "f", "start": [0], "shape": [True]}]}}},
    "hole": {"weight": {"x": {"shape": [2], "pieces": [{"file": "f", "start": [0], "shape": [1]}]}}},
    "dims": {"weight": {"x": {"shape": [2], "pieces": [{"file": "f", "start": [0, 0], "shape": [2, 1]}]}}},
    "many dims": {"weight": {"x": {"shape": [1] * 40, "pieces": []}}},
    **{
        f"file {name}": {"weight": {"x": {"shape": [1], "pieces": [{"file": name, "start": [0], "shape": [1]}]}}}
        for name in ("../f", "/etc/passwd", "..", ".", "", "a\0b", "-\n", 7)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_an_index_that_is_none_is_refused(tmp_path: Path, case: str):
    (tmp_path / pieces.NAME).write_text(json.dumps(BROKEN[case]))
    with pytest.raises(UserError, match=r"index.json: not the index of a checkpoint \(.*\); load another"):
        pieces.read_index(tmp_path)


def test_a_file_that_is_not_what_the_index_says_is_named(tmp_path: Path):
    folder = write_checkpoint(tmp_path)
    index = json.loads((folder / "index.json").read_text())
    first, second = index["weight"]["embedding.tokens.weight"]["pieces"]
    first["shape"][0] -= 1
    second["shape"][0] += 1
    second["start"][0] -= 1
    (folder / "index.json").write_text(json.dumps(index))
    seal(folder)
    for ask in (Reader.check, lambda r: r.read("weight", "embedding.tokens.weight")):
        with Reader(folder) as reader, pytest.raises(UserError, match=r"safetensors: embedding.* says F32 of"):
            ask(reader)
    with Reader(folder) as reader, pytest.raises(UserError, match="no weight of y: it is of another architecture"):
        reader.read("weight", "y")
