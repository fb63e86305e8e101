"""A sample of `python -m tests.soak.damage`, and that it sees what nobody checks."""

from __future__ import annotations

from pathlib import Path

from megagpt.checkpoint import folders, integrity, load
from megagpt.processes.local import run_ranks
from tests.soak.damage import FOUND_BY, Counts, cuts, damage_and_look, flip, flips, make_run

N_FLIPS, N_CUTS = 80, 20


def test_damage_anywhere_is_found(tmp_path: Path):
    run = make_run(tmp_path)
    flipped, shortened = flips(run, N_FLIPS, seed=0), cuts(run, N_CUTS, seed=0)
    assert (flipped.n, shortened.n) == (N_FLIPS, N_CUTS)
    assert flipped.silent == shortened.silent == []
    assert flipped.found_by.keys() | shortened.found_by.keys() <= FOUND_BY.keys()
    assert len(flipped.by_file) == 10
    # What it is for: safetensors itself compares lengths, and takes most of what is flipped.
    assert flipped.silent_to_safetensors > 0.5 * flipped.to_safetensors and shortened.silent_to_safetensors == 0


def look_without_hashes(run: Path) -> Counts:
    """The same where every hash is said to be right."""
    for module in (folders, integrity, load):
        module.damage_to = lambda folder, names, hashes: []
    return damage_and_look(run, 30, 0, flip)


def test_what_nobody_checks_is_reported(tmp_path: Path):
    (counts,) = run_ranks(look_without_hashes, 1, make_run(tmp_path))
    assert len(counts.silent) > 15
