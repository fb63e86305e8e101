"""Flip single bits of a checkpoint, and cut bytes out of it, anywhere; --load must find every one.

    python -m tests.soak.damage --flips 2000 --cuts 500 --seed 0 --json counts.json

The file is drawn evenly (`latest` is one of them), then the place in it, so that small files get their share. What is
asked is what --load does first, in both ways in which a checkpoint is named, and what --load-fallback makes of it.
Exit code 1 where anything was not found.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from megagpt.checkpoint.integrity import damage_of
from megagpt.checkpoint.load import find_whole
from megagpt.errors import UserError
from megagpt.processes.local import run_ranks
from tests.checkpoint.written_checkpoint import KEYS, write_checkpoint

FOUND_BY = {
    "form of latest": r"which names no checkpoint|no checkpoint in ",
    "hash in latest": r"whose SHA256SUMS is missing or not the one that was written",
    "hash in SHA256SUMS": r"its contents have changed",
    "form of SHA256SUMS": r"SHA256SUMS(, line|: cut|: cannot be read)",
    "names in SHA256SUMS": r": missing|: not in SHA256SUMS|SHA256SUMS: has no",
}


@dataclass
class Counts:
    """What became of n damages. by_file, found_by: how often; silent: descriptions of what nobody noticed.

    to_safetensors, silent_to_safetensors: of a file with tensors, and how many of these its own reader takes.
    """

    n: int = 0
    by_file: Counter[str] = field(default_factory=Counter)
    found_by: Counter[str] = field(default_factory=Counter)
    to_safetensors: int = 0
    silent_to_safetensors: int = 0
    silent: list[str] = field(default_factory=list)


def main() -> int:
    """Damage, look, restore; print the counts."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.damage", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flips", type=int, default=2000, help="flip one bit, so many times (default 2000)")
    parser.add_argument("--cuts", type=int, default=500, help="cut bytes out, so many times (default 500)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the counts here")
    a = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder))
        found = {"flips": flips(run, a.flips, a.seed), "cuts": cuts(run, a.cuts, a.seed)}
    counts = {name: vars(count) for name, count in found.items()}
    print(json.dumps(counts, indent=1))
    if a.json:
        a.json.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return 1 if any(count.silent for count in found.values()) else 0


def make_run(folder: Path) -> Path:
    """A run with a checkpoint to damage and an older one to fall back on."""
    random = np.random.default_rng(0)
    for step in (10, 20):
        tensors = {
            key: {name: random.random((40, 8), np.float32) for name in ("blocks.0.mlp.up.weight", "x.weight")}
            for key in KEYS
        }
        write_checkpoint(folder / "run", step, tensors, validation_loss=3.0)
    return folder / "run"


def flips(run: Path, n: int, seed: int) -> Counts:
    """Flip one bit of the newest checkpoint of a run, n times."""
    return run_ranks(damage_and_look, 1, run, n, seed, flip, timeout_s=3600)[0]


def cuts(run: Path, n: int, seed: int) -> Counts:
    """Cut 1 to 100 bytes, or all from a place on, out of the newest checkpoint of a run, n times."""
    return run_ranks(damage_and_look, 1, run, n, seed, cut, timeout_s=3600)[0]


def flip(data: bytes, draw: random.Random) -> bytes:
    """One bit changed."""
    place = draw.randrange(8 * len(data))
    flipped = bytearray(data)
    flipped[place // 8] ^= 1 << place % 8
    return bytes(flipped)


def cut(data: bytes, draw: random.Random) -> bytes:
    """Some bytes less."""
    start = draw.randrange(len(data))
    end = len(data) if draw.random() < 0.5 else min(len(data), start + draw.randint(1, 100))
    return data[:start] + data[end:]


def damage_and_look(run: Path, n: int, seed: int, damage: Callable[[bytes, random.Random], bytes]) -> Counts:
    """Damage a file, ask for the checkpoint, put the file back; n times."""
    newest, draw, counts = run / "checkpoints" / "step-000020", random.Random(seed), Counts()
    files = [*sorted(newest.iterdir()), run / "checkpoints" / "latest"]
    for _ in range(n):
        path = draw.choice(files)
        before = path.read_bytes()
        after = damage(before, draw)
        path.write_bytes(after)
        try:
            look(run, newest, path.name, counts)
            if path.suffix == ".safetensors":
                counts.to_safetensors += 1
                counts.silent_to_safetensors += taken_by_safetensors(after)
        finally:
            path.write_bytes(before)
    assert find_whole(run, False, print) == newest  # put back as it was
    return counts


def look(run: Path, newest: Path, name: str, counts: Counts) -> None:
    """Ask for the damaged checkpoint in every way."""
    counts.n += 1
    counts.by_file[name] += 1
    for asked in [str(run)] if name == "latest" else [str(run), f"{run}@20"]:
        try:
            find_whole(asked, False, print)
        except UserError as error:
            counts.found_by[found_by(str(error))] += 1
        else:
            counts.silent.append(f"--load {asked}: {name}")
        back = find_whole(asked, True, lambda note: None, newest_will_do=True)
        if damage_of(back) or (back == newest) != (name == "latest"):
            counts.silent.append(f"--load-fallback with --load {asked}: {name}")


def found_by(message: str) -> str:
    """Which check spoke."""
    return next((check for check, pattern in FOUND_BY.items() if re.search(pattern, message)), message)


def taken_by_safetensors(data: bytes) -> bool:
    """Whether the library reads the file without complaint."""
    try:
        load(data)
    except (SafetensorError, ValueError, KeyError, UnicodeDecodeError):
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
