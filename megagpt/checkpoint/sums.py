"""SHA256SUMS: the hash of every file of a checkpoint, and what does not agree with it.

safetensors has no checksum and a JSON has none either: one flipped bit would be read as a weight. The file has the
format of sha256sum, so that `sha256sum -c SHA256SUMS` says the same without this program.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from megagpt.errors import UserError
from megagpt.files import require_regular

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9_.-]+)")


def sha256_of(path: Path) -> str:
    """The hash of a file, in hexadecimal.  Raises OSError, also for what would never end (a pipe, a device)."""
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_text(sums: dict[str, str]) -> str:
    """SHA256SUMS for hashes by file name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))


def read_sums(folder: Path) -> dict[str, str]:
    """Hash by file name.  Raises UserError where the file is missing or is not what `to_text` writes."""
    path = folder / NAME
    try:
        require_regular(path)
        text = path.read_bytes().decode("ascii")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: {folder} is no checkpoint, or an unfinished one; load another") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); the checkpoint is damaged, load another") from None
    sums: dict[str, str] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums:
            raise UserError(f"{path}, line {number}: got {line[:80]!r}; the checkpoint is damaged, load another")
        sums[match[2]] = match[1]
    if text != to_text(sums) or not sums:
        raise UserError(f"{path}: cut short, or not in order; the checkpoint is damaged, load another")
    return sums


def damage(folder: Path, names: Iterable[str], sums: dict[str, str]) -> list[str]:
    """What is wrong with these files of a checkpoint: one line each, empty where all are as they were written."""
    found = []
    for name in names:
        path = folder / name
        try:
            got = sha256_of(path)
        except (FileNotFoundError, NotADirectoryError):
            found.append(f"{path}: missing")
        except OSError as error:
            found.append(f"{path}: cannot be read ({error.strerror})")
        else:
            if name not in sums:
                found.append(f"{path}: not in {NAME}")
            elif got != sums[name]:
                found.append(f"{path}: its contents have changed (sha256 {got[:12]}…, written as {sums[name][:12]}…)")
    return found
