"""Programs whose standard streams are closed, full, or in an encoding of long ago."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
from megagpt.errors import run_cli
from megagpt.streams import endure_streams

def main():
    if "endure" in sys.argv:
        endure_streams()
    file = open(sys.argv[1], "w")
    print("ein Weg … mit ─ Umlauten: äöü", flush=True)
    file.write(f"{file.fileno()} {sys.stdout.isatty()}")

run_cli(main)
"""


def run(tmp_path: Path, redirect: str, *words: str, **environment: str) -> tuple[int, bytes, bytes, str]:
    """Exit code, stdout, stderr, and what the program wrote of its first file."""
    found = tmp_path / "found"
    done = subprocess.run(
        ["bash", "-c", f'exec "$@" {redirect}', "bash", sys.executable, "-c", PROGRAM, str(found), *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
    )
    return done.returncode, done.stdout, done.stderr, found.read_text() if found.exists() else ""


def test_a_closed_stdout_is_nobodys_file(tmp_path: Path):
    code, out, err, found = run(tmp_path, "0>&- 1>&- 2>&-")
    assert (code, out, err) == (0, b"", b"")
    assert int(found.split()[0]) > 2, "what libraries print would go into that file"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252:strict"])
def test_an_encoding_without_our_letters_gets_escapes(encoding: str, tmp_path: Path):
    code, out, err, _ = run(tmp_path, "", PYTHONIOENCODING=encoding)
    assert (code, err) == (0, b"")
    assert out.decode(encoding.split(":")[0]).replace("\\u2026", "…").startswith("ein Weg … mit \\u2500 Umlauten: ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_training_goes_on_without_a_place_for_its_output(tmp_path: Path):
    code, _, err, found = run(tmp_path, "> /dev/full", "endure")
    assert (code, err, found != "") == (0, b"", True), err
    code, _, err, _ = run(tmp_path, "> /dev/full")
    assert code != 0 and b"No space left" in err, "else the test above could not fail"
