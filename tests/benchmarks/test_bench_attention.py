"""The benchmark of attention runs every row and writes its figures; nothing about its speed."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import attention


@pytest.mark.slow
def test_every_row_is_measured(tmp_path, monkeypatch):
    figures = tmp_path / "figures.json"
    flags = ["--seq-len", "64", "--batch-size", "1", "--rounds", "1", "--json", str(figures)]
    monkeypatch.setattr(sys, "argv", ["attention", *flags])
    attention.main()
    written = json.loads(figures.read_text())
    assert [row["layer"] for row in written["rows"]] == list(attention.rows(64, "cpu"))
    assert all(row["time_s"] > 0 for row in written["rows"])
    assert written["rows"][0]["ratio"] == 1.0
