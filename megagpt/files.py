"""Files that are there or are not: what is written is flushed to the disk before its name appears."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Replace a small file at once: readers see the old text or the new one, also after a loss of power."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def require_regular(path: Path) -> None:
    """Raise OSError unless path is a file: a pipe or a device in its place would be waited for, or never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def placeholder(head: bytes) -> str | None:
    """What stands in for a file that was never fetched, and the remedy; None where these are the first bytes of a file."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return "a pointer of Git LFS in place of the file; fetch that with `git lfs pull`"
    if head.startswith(b"/annex/objects/"):
        return "a pointer of git-annex in place of the file; fetch that with `git annex get`"
    return None


def flush(path: Path) -> None:
    """Wait until a file's contents, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """The hash of a file, in hexadecimal.  Raises OSError, also for what would never end (a pipe, a device)."""
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
