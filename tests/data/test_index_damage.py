"""A sample of the damage that `python -m tests.soak.index_damage` does; and that its counts can fail."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.soak import index_damage
from tests.soak.index_damage import BY_HASH, BY_STRUCTURE, SAME, SILENT


def test_no_damage_is_read_otherwise_unseen(tmp_path: Path) -> None:
    rows = index_damage.run(tmp_path, n_flips=40, n_cuts=20, seed=7, peers=False)
    assert index_damage.unfound(rows) == []
    guarded = [row for row in rows if row["guarded"]]
    assert {row["file"] for row in guarded} == {".idx", ".bin", ".json"}
    assert all(row[BY_STRUCTURE] + row[BY_HASH] + row[SAME] == row["count"] for row in guarded)
    assert not list(tmp_path.glob("*.partial"))
    (unhashed,) = [r for r in rows if (r["reader"], r["file"], r["damage"]) == ("opening", ".bin", "flips")]
    assert unhashed[SILENT] == 40  # what is left to --verify; so the count can be other than 0


def test_a_reader_that_does_not_look_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the hash, boundaries of documents may move unseen."""
    prefix = tmp_path / "a"
    index_damage.make_dataset(prefix, seed=7, has_side_file=True)
    good = Path(f"{prefix}.idx").read_bytes()
    boundaries = [len(good) - 8 * i for i in range(2, index_damage.N_DOCUMENTS)]
    moved = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in boundaries]
    counts = index_damage.count_outcomes(index_damage.opened, prefix, ".idx", iter(moved))
    assert counts[BY_HASH] > 100 and counts[SILENT] == 0
    monkeypatch.setattr("megagpt.data.indexed.dataset.read_meta", lambda prefix: None)
    assert index_damage.count_outcomes(index_damage.opened, prefix, ".idx", iter(moved))[SILENT] == counts[BY_HASH]


def test_damage_is_damage() -> None:
    data = bytes(range(200))
    for kind in ("flips", "cuts"):
        copies = list(index_damage.damage(data, kind, 50, np.random.default_rng(0)))
        assert len(copies) == 50 and data not in copies
        assert copies == list(index_damage.damage(data, kind, 50, np.random.default_rng(0)))
    assert all(sum(a != b for a, b in zip(data, copy, strict=True)) == 1 for copy in index_damage.damage(
        data, "flips", 50, np.random.default_rng(0)))  # fmt: skip
