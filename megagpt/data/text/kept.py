"""What a call that ends early leaves to the next one: the input files that are done, and what became of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from megagpt.data.indexed.dataset import Mark
from megagpt.data.text.documents import InputFile
from megagpt.data.text.measured import Measured
from megagpt.files import replace_text


@dataclass(frozen=True)
class Kept:
    """settings: a hash of what else the datasets follow from. files: path, size and time of change of those that are
    done. marks, measured: of each dataset up to there. bad: what was left out.
    """

    settings: str
    files: list[tuple[str, int, int]]
    marks: list[Mark]
    measured: list[Measured]
    bad: list[str]


_CHECKED = TypeAdapter(Kept)


def identity(files: Sequence[InputFile]) -> list[tuple[str, int, int]]:
    """What tells whether files are still those that they were."""
    stats = [(str(file.path.resolve()), file.path.stat()) for file in files]
    return [(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats]


def kept_path(prefix: str) -> Path:
    """Beside the .partial files of the first dataset."""
    return Path(f"{prefix}.kept.partial")


def write_kept(prefix: str, kept: Kept) -> None:
    """Raises OSError."""
    replace_text(kept_path(prefix), json.dumps(asdict(kept)))


def read_kept(prefix: str, settings: str, files: Sequence[InputFile]) -> Kept | None:
    """What an earlier call kept, if this one is to do the same and begins with the same files; else None."""
    try:
        kept = _CHECKED.validate_json(kept_path(prefix).read_bytes())
        same = kept.settings == settings and kept.files == identity(files[: len(kept.files)])
    except (OSError, ValidationError):
        return None
    return kept if same else None
