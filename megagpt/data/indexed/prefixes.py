"""The prefix that names a dataset: whether there is one, and which one was meant."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path

from megagpt.errors import UserError

_TEXT_SUFFIXES = (".jsonl", ".json", ".ndjson", ".txt", ".md", ".gz", ".zst", ".bz2", ".xz", ".parquet")
_KEY = re.compile(r"_[^_]*_document$")  # what P_text_document has after P
_SHOWN = 3


def require_dataset(prefix: str | Path) -> None:
    """Raise `UserError` unless both files of a dataset are there: with what was meant, as far as one can tell."""
    missing = [path for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")) if not os.path.lexists(path)]
    if not missing:
        return
    if not str(prefix):
        raise UserError("--data-path is empty; give what tools/preprocess_data.py wrote, P_text_document")
    if len(missing) == 1:
        raise UserError(
            f"{missing[0]}: not there, though the other file of the dataset is; {_half(prefix, missing[0])}"
        )
    raise UserError(f"{prefix}: no dataset of that name ({prefix}.idx is not there); {_meant(Path(prefix))}")


def _half(prefix: str | Path, missing: Path) -> str:
    partial = missing.with_name(missing.name + ".partial")
    return (
        f"{partial} is: preprocessing has not ended" if partial.exists() else "fetch it too, or run preprocess_data.py"
    )


def _meant(path: Path) -> str:
    if path.is_dir():
        return _one_of(_in(path), "it is a folder, in which there {verb} {names}", "it is a folder without datasets")
    if path.suffix in (".bin", ".idx", ".json") and _is_dataset(path.with_suffix("")):
        return f"the prefix has no {path.suffix}: give {path.with_suffix('')}"
    if path.suffix.lower() in _TEXT_SUFFIXES and path.exists():
        return "it is text: turn it into tokens first (tools/preprocess_data.py --input)"
    if not path.parent.is_dir():
        return f"there is no folder {path.parent} either; check the path"
    if Path(f"{path}.idx.partial").exists():
        return "preprocessing has not ended (.partial): run it again, it goes on where it can"
    beside = list(_in(path.parent))
    longer = [found for found in beside if found.startswith(f"{path}_") and found.endswith("_document")]
    names = {_KEY.sub("", Path(found).name): found for found in reversed(beside)}
    near = get_close_matches(_KEY.sub("", path.name), names, n=_SHOWN)
    none = "give what tools/preprocess_data.py wrote, P_text_document"
    return _one_of(longer or [names[name] for name in near], "did you mean {names}?", none)


def _one_of(found: Iterable[str], some: str, none: str) -> str:
    names = list(found)
    shown = ", ".join(names[:_SHOWN]) + (" …" if len(names) > _SHOWN else "")
    return some.format(names=shown, verb="is" if len(names) == 1 else "are") if names else none


def _is_dataset(path: Path) -> bool:
    return Path(f"{path}.idx").exists() and Path(f"{path}.bin").exists()


def _in(folder: Path) -> Iterator[str]:
    """The prefixes of the datasets in a folder."""
    for path in sorted(folder.glob("*.idx")):
        if _is_dataset(path.with_suffix("")):
            yield str(path.with_suffix(""))
