"""The default corpus: the Python standard library of this machine, prepared as a user would prepare a folder.

Source code and docstrings, real text that every machine with Python has. A SentencePiece BPE tokenizer of
4096 tokens is trained on a sample of it first; it gives texts back to the byte, so bits per byte are exact.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import platform
import random
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sentencepiece import SentencePieceTrainer

from megagpt.data.text.prepare import TokenizerFiles, prepare
from megagpt.errors import UserError
from megagpt.files import os_reason

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "encodings"}  # encodings: tables
_SEED = 1234
_FORMAT = 2  # of the files kept; 2: the side file has a hash of its own
_SAMPLE_BYTES = 4_000_000
_CHUNK_CHARS = 2000
_TRAINER = {
    "model_type": "bpe",
    "vocab_size": 4096,
    "byte_fallback": True,
    # Keep the text as it is, so that decoding gives it back to the byte.
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,  # indentation becomes tokens
    "unk_id": 0,
    "eos_id": 1,
    "bos_id": -1,
    "pad_id": -1,
    "max_sentence_length": 1 << 16,
    "num_threads": 1,
    "minloglevel": 2,
}


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/megagpt, or ~/.cache/megagpt; for a user without a home a folder among the temporary ones."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megagpt"
    except RuntimeError:  # neither HOME nor an entry among the users: as containers start programs
        return _own_temporary_folder()


def _own_temporary_folder() -> Path:
    """Raises UserError where somebody else has taken its name."""
    folder = Path(tempfile.gettempdir()) / f"megagpt-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(f"{folder} belongs to another user; set HOME, or --data.cache-dir")
    return folder


def default_corpus(cache_dir: Path, announce: Callable[[str], None] = print) -> str:
    """Prefix of the default corpus under cache_dir, made by the first process that asks; others wait for it.

    announce is told when something slow begins.

    **Raises** `UserError` when this Python has no sources, or cache_dir cannot be written.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = _source_files(root)
    folder = cache_dir / f"stdlib-{platform.python_version()}-{_key(root, files)}"
    prefix = folder / "corpus_text_document"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not _is_complete(prefix):
            with _locked(folder / "lock", announce):
                if not _is_complete(prefix):
                    _build(files, folder, announce)
    except OSError as error:
        raise UserError(f"{folder}: cannot be used ({os_reason(error)}); set --data.cache-dir") from None
    return str(prefix)


def _build(files: list[Path], folder: Path, announce: Callable[[str], None]) -> None:
    files = [path for path in files if _is_text(path)]
    random.Random(_SEED).shuffle(files)  # splits are contiguous: each must be a fair sample
    megabytes = sum(path.stat().st_size for path in files) / 1e6
    announce(
        f"preparing the default corpus, once: {len(files):,} files of the Python standard library, "
        f"{megabytes:.0f} MB, into {folder}"
    )
    model = folder / "tokenizer.model"
    partial = folder / "tokenizer.model.partial"
    partial.write_bytes(_train_tokenizer(files))
    partial.replace(model)
    prepare(
        [str(path) for path in files],
        str(folder / "corpus"),
        TokenizerFiles(kind="sentencepiece", model=str(model)),
        append_eod=True,
        workers=1,  # a worker process would import the caller's main module, torch and all, before it helps
        input_format="text",
        overwrite=True,
    )


def _train_tokenizer(files: Iterable[Path]) -> bytes:
    """A SentencePiece model, from the first files up to `_SAMPLE_BYTES`."""
    model = io.BytesIO()
    SentencePieceTrainer.train(sentence_iterator=_chunks(files), model_writer=model, **_TRAINER)
    return model.getvalue()


def _chunks(files: Iterable[Path]) -> Iterator[str]:
    """Runs of whole lines: inside one, newlines and indentation are characters like others to the trainer."""
    size = 0
    for path in files:
        chunk = ""
        for line in path.read_bytes().decode().splitlines(keepends=True):
            if chunk and len(chunk) + len(line) > _CHUNK_CHARS:
                yield chunk
                chunk = ""
            chunk += line
        if chunk:
            yield chunk
        size += path.stat().st_size
        if size >= _SAMPLE_BYTES:
            return


def _source_files(root: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        found += [Path(parent, name) for name in names if name.endswith(".py")]
    found = sorted(path for path in found if path.is_file() and path.stat().st_size)
    if not found:
        raise UserError(f"{root}: has no Python sources to serve as the default corpus; give --data-path")
    return found


def _is_text(path: Path) -> bool:
    """Some tests of the standard library are not UTF-8, on purpose."""
    data = path.read_bytes()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\x00" not in data


def _key(root: Path, files: Iterable[Path]) -> str:
    """What goes in decides where it is kept: settings, names and sizes of the files."""
    listing = [(str(path.relative_to(root)), path.stat().st_size) for path in files]
    settings = [_FORMAT, _TRAINER, _SAMPLE_BYTES, _CHUNK_CHARS, _SEED]
    return hashlib.sha256(json.dumps([settings, listing]).encode()).hexdigest()[:12]


def _is_complete(prefix: Path) -> bool:
    return Path(f"{prefix}.idx").exists()  # appears last


@contextmanager
def _locked(path: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Hold a file's lock (a process that dies gives it up); say so when another process has it."""
    with open(path, "wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce("waiting for another process that prepares the default corpus")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
