"""README's reading path: files that are there, each imported by one before it, and no longer than the README says."""

from __future__ import annotations

import re
from pathlib import Path

from tests.repository.imports import dotted_name, read_graph

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "README.md").read_text(encoding="utf-8").split("## Reading path")[1].split("\n## ")[0]
PATH = re.findall(r"^\d+\. \[`([\w/.]+)`\]\(([\w/.]+)\): \S", SECTION, re.MULTILINE)


def test_the_path_is_one_of_files_from_the_command():
    assert all(shown == linked and (ROOT / linked).is_file() for shown, linked in PATH), PATH
    assert PATH[0][0] == "examples/pretrain_gpt.py" and 10 <= len(PATH) <= 14
    assert len(PATH) == len(re.findall(r"^\d+\. ", SECTION, re.MULTILINE))


def test_each_file_is_imported_by_one_before_it():
    graph, seen = read_graph(ROOT), set[str]()
    for shown, _ in PATH:
        module = dotted_name(Path(shown))
        assert not seen or module in seen, f"{shown} is not imported by a file before it; put it behind one that does"
        seen |= {found.target for found in graph[module]}


def test_it_is_no_longer_than_it_says():
    (stated,) = re.findall(r"(\d,\d00) lines", SECTION)
    lines = sum(len((ROOT / shown).read_text(encoding="utf-8").splitlines()) for shown, _ in PATH)
    assert lines <= int(stated.replace(",", "")) <= 1600, f"{lines} lines on the path, README says at most {stated}"
