"""Files that are there or are not: what is written is flushed to the disk before its name appears."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
from pathlib import Path
from typing import IO, Any


def replace_text(path: Path, text: str) -> None:
    """Replace a small file at once: readers see the old text or the new one, also after a loss of power.

    A link, pipe or device of that name is replaced too, not written through.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    flush(path.parent)


def delete(path: Path) -> None:
    """Remove what has that name, if anything does. Of a link only the link goes: what it points to is not ours."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


def open_own(path: Path, mode: str, buffering: int = -1, errors: str | None = None) -> IO[Any]:
    """Open a file of a run to write to. A link of that name goes first: what it points to is not ours to write to.

    Raises OSError for a pipe, a device or a folder, which would be waited for, or never end.
    """
    if path.is_symlink():
        path.unlink()
    if path.exists() and not path.is_dir():  # which opening it says better
        require_regular(path)
    encoding = None if "b" in mode else "utf-8"
    return open(path, mode, buffering, encoding, errors, opener=_not_following)


def _not_following(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


def os_reason(error: OSError) -> str:
    """Why, for a message: the library leaves the usual place empty for errors of its own."""
    return error.strerror or str(error) or type(error).__name__


def json_text(value: Any, indent: int | None = None) -> str:
    """The value as JSON, which has no NaN and no Inf: they become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def require_regular(path: Path) -> None:
    """Raise OSError unless path is a file: a pipe or a device in its place would be waited for, or never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def placeholder(head: bytes) -> str | None:
    """By its first bytes, what stands in for a file that was never fetched, and the remedy; None for a file itself."""
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
