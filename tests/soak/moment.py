"""Where a run is with its checkpoints, told from what lies on the disk: where a kill hits."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from megagpt.checkpoint import folders, integrity, pieces

# In the order in which a save goes through them.
WINDOWS = (
    "no save under way",
    "temporary folder, nothing in it",
    "tensors, no index.json",
    "index.json, no SHA256SUMS",
    "SHA256SUMS, not renamed",
    "renamed, latest not moved",
    "latest being written",
    "old checkpoint being deleted",
)
QUIET, EMPTY, TENSORS, INDEX, SUMS, RENAMED, POINTER, DELETING = WINDOWS
_CHECKPOINT = re.compile(r"step-(\d{6})")


@dataclass(frozen=True)
class Look:
    """checkpoints/ at one moment. saving: step whose temporary folder is there. pointed: the one `latest` names."""

    window: str
    saving: int | None
    pointed: int
    complete: tuple[int, ...]


def look(run: Path) -> Look:
    """What lies there now. Not atomic: a save that goes on meanwhile may be seen in either of two windows."""
    folder = run / "checkpoints"
    names = _names(folder)
    pointed = _pointed(folder)
    saving = [int(name[5:11]) for name in names if _CHECKPOINT.fullmatch(name.removesuffix(".tmp")) and ".tmp" in name]
    complete = tuple(sorted(int(name[5:]) for name in names if _CHECKPOINT.fullmatch(name)))
    window = QUIET
    if saving:
        window = _window(_names(folder / f"step-{saving[0]:06d}.tmp"))
    elif any(name.startswith(f"{folders.LATEST}.") for name in names):
        window = POINTER
    elif complete and complete[-1] > pointed:
        window = RENAMED
    elif any(name.endswith(".deleted.tmp") for name in names):
        window = DELETING
    return Look(window, saving[0] if saving else None, pointed, complete)


def _window(names: list[str]) -> str:
    if integrity.SUMS in names:
        return SUMS
    if pieces.NAME in names:
        return INDEX
    return TENSORS if names else EMPTY


def _pointed(folder: Path) -> int:
    try:
        return int((folder / folders.LATEST).read_text(encoding="ascii")[5:11])
    except FileNotFoundError:
        return 0


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
