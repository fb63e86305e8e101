"""Files that are whole or not there, links that are not followed, and JSON that is JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megagpt.files import delete, json_text, open_own, replace_text


def test_json_has_no_bare_nan():
    def refuse(name: str) -> float:
        raise AssertionError(name)

    values = {"loss": math.nan, "rows": [{"perplexity": math.inf, "lr": 0.1}, (-math.inf, 1)], "name": "NaN"}
    text = json_text(values, indent=1)
    read = json.loads(text, parse_constant=refuse)
    assert read == {"loss": None, "rows": [{"perplexity": None, "lr": 0.1}, [None, 1]], "name": "NaN"}


def test_of_a_link_only_the_link_is_deleted(tmp_path: Path):
    (tmp_path / "there" / "deep").mkdir(parents=True)
    for name, target in (("folder", "there"), ("nowhere", "gone")):
        (tmp_path / name).symlink_to(tmp_path / target)
        delete(tmp_path / name)
    delete(tmp_path / "nothing")
    assert [p.name for p in tmp_path.iterdir()] == ["there"] and (tmp_path / "there" / "deep").is_dir()
    delete(tmp_path / "there")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("write", [replace_text, lambda path, text: open_own(path, "a").write(text)])
def test_a_link_is_not_written_through(tmp_path: Path, write):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    write(tmp_path / "link", "other")
    assert (tmp_path / "precious").read_text() == "text" and not (tmp_path / "link").is_symlink()
