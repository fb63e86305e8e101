"""text8 and enwik8: the beginning of Wikipedia, cleaned to a–z and blanks, and as its XML is (Mahoney 2006)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megagpt.errors import UserError
from megagpt.evaluate.language import BITS, PPL, Passage, Windowed, of_passages
from megagpt.evaluate.task import Task

WHOLE, LAST = 100_000_000, 5_000_000


def last_bytes(path: Path, whole: int = WHOLE, last: int = LAST) -> str:
    """The last bytes of a file, from the first character that is whole.

    Raises UserError where the file has not `whole` bytes, of which the share is taken, or these are no UTF-8.
    """
    try:
        n = path.stat().st_size
        if n != whole:
            raise UserError(f"{path} has {n:,} bytes", f"wanted {whole:,}", "get it anew")
        with path.open("rb") as file:
            file.seek(whole - last)
            data = file.read()
        return data.lstrip(bytes(range(0x80, 0xC0))).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}", "wanted a file in UTF-8", "get it anew") from None


def read(paths: Sequence[Path]) -> list[Passage]:
    """The test part, which is the last 5 %, as one stream."""
    text = last_bytes(paths[0])
    return [Passage(text, text)]


ASK = Windowed(f"the last {LAST:,} bytes as one stream, as they are", of_passages())
TASKS = tuple(
    Task(
        name=name,
        about=about,
        protocol=ASK.protocol,
        source=f"Mahoney 2006, mattmahoney.net/dc/{name}.zip",
        files=(f"{name}/{name}",),
        read=read,
        ask=ASK,
        figures=BITS | PPL,
    )
    for name, about in (
        ("text8", "the end of a cleaned Wikipedia; bits per byte are bits per character"),
        ("enwik8", "the end of a Wikipedia in XML"),
    )
)
