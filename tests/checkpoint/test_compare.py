"""Numbers about tensors, against numpy over whole tensors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from megagpt.checkpoint import chunks
from megagpt.checkpoint.compare import TensorDifference, differing_fields, differing_tensors, summaries
from megagpt.checkpoint.pieces import Reader
from tests.checkpoint.written_checkpoint import gpt2_tensors, state_of, write_checkpoint


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 128)


def differences(tmp_path: Path, a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[TensorDifference]:
    """Of two checkpoints with these weights, which are cut differently."""
    one = write_checkpoint(tmp_path / "a", tensors={"weight": a}, n_files=1)
    two = write_checkpoint(tmp_path / "b", tensors={"weight": b}, n_files=3)
    with Reader(one) as first, Reader(two) as second:
        return list(differing_tensors(first, second))


def test_every_tensor_in_numbers(tmp_path: Path):
    tensors = gpt2_tensors()
    tensors["head.norm.bias"][3:5] = np.nan, -np.inf
    tensors["head.norm.weight"][:] = np.nan
    with Reader(write_checkpoint(tmp_path, tensors={"weight": tensors})) as reader:
        found = {s.name: s for s in summaries(reader)}
    assert found.keys() == tensors.keys()
    for name, values in tensors.items():
        finite = values[np.isfinite(values)].astype(np.float64)
        assert (found[name].shape, found[name].n_not_finite) == (values.shape, values.size - finite.size)
        if finite.size:
            assert found[name].norm == pytest.approx(np.linalg.norm(finite), rel=1e-12)
            assert (found[name].low, found[name].high) == (finite.min(), finite.max())
        else:
            assert math.isnan(found[name].norm) and math.isnan(found[name].low)


def test_equal_tensors_do_not_differ_however_they_are_cut(tmp_path: Path):
    tensors = gpt2_tensors()
    tensors["head.norm.bias"][0] = np.nan  # equal bit for bit
    assert differences(tmp_path, tensors, tensors) == []


def test_a_difference_in_numbers(tmp_path: Path):
    tensors, changed = gpt2_tensors(), gpt2_tensors()
    changed["blocks.1.mlp.up.weight"][60, 3] += 0.5
    changed["blocks.1.mlp.up.weight"][2, 1] -= 0.25
    ours, theirs = tensors["blocks.1.mlp.up.weight"], changed["blocks.1.mlp.up.weight"]
    (found,) = differences(tmp_path, tensors, changed)
    assert (found.key, found.name, found.n_values) == ("weight", "blocks.1.mlp.up.weight", 2)
    assert found.largest == np.abs(ours.astype(np.float64) - theirs).max()
    assert found.relative == found.largest / np.abs(ours).max()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_nan_that_only_one_has_is_a_difference(tmp_path: Path, value: float):
    tensors, changed = gpt2_tensors(), gpt2_tensors()
    changed["head.norm.bias"][0] = value
    changed["head.norm.bias"][15] += 1  # in a later chunk
    (found,) = differences(tmp_path, tensors, changed)
    assert (found.what, found.n_values) == ("NaN or Inf", 2) and not math.isfinite(found.largest)


def test_missing_tensors_and_other_shapes(tmp_path: Path):
    zeros = np.zeros((2, 3), np.float32)
    found = differences(tmp_path, {"x": zeros, "y": zeros, "z": zeros}, {"x": zeros.T, "z": zeros, "new": zeros})
    assert [(d.name, d.what) for d in found] == [
        ("new", "only in the second"),
        ("x", "shape (2, 3) and (3, 2)"),
        ("y", "only in the first"),
    ]


def test_what_states_differ_in():
    a, b = state_of(1), state_of(2, config={"model": {"d_model": 8}, "new": 1}, counters={"skipped_steps": 0})
    fields = {name: (x, y) for name, x, y in differing_fields(a, b)}
    assert fields["step"] == (1, 2) and fields["config.model.d_model"] == (16, 8) and fields["config.new"] == (None, 1)
    assert fields["config.train.seed"] == (1234, None) and "counters.skipped_steps" not in fields
    assert differing_fields(a, a) == []
