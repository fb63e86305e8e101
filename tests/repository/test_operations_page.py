"""docs/operations.md speaks of flags, files and messages that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megagpt.cli.flags import all_flags

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "operations.md").read_text()
OTHERS = {  # flags of launchers, of Slurm and of our tools
    "--hostfile", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--max-restarts", "--shutdown-timeout",
    "--signals-to-handle", "--master_addr", "--signal", "--json", "--config", "--wait-s",
}  # fmt: skip
MESSAGES = [
    "gave no sign of life for", "was stopped by a signal", "died", "hangs", "processes came within", "is slow",
    "no answer from rank 0 at", "steps in a row", "holds a NaN or Inf", "and none when it was done again",
    "robust standard deviations above", "its contents have changed", "is being written by another run", "skipped (",
    "still waiting for", "gave no answer as a store",
]  # fmt: skip
SOURCE = "\n".join(path.read_text() for path in (ROOT / "megagpt").rglob("*.py"))


def test_its_flags_exist():
    known = OTHERS | {flag for flags in all_flags().values() for flag in flags}
    assert sorted(set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z]", PAGE)) - known) == []


@pytest.mark.parametrize("message", MESSAGES)
def test_its_messages_are_those_of_the_program(message: str):
    assert message in PAGE and message in SOURCE


def test_its_files_exist():
    named = re.findall(r"\b((?:tools|tests|examples|docs)/[\w/]+(?:\.\w+)?)", PAGE)
    named += [
        f"docs/{name}" if "/" not in name else name.removeprefix("../") for name in re.findall(r"\]\(([^)]+)\)", PAGE)
    ]
    assert [name for name in named if not (ROOT / name).exists()] == []
    assert len(named) > 8
