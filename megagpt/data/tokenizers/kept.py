"""The tokenizer of a run, kept in its folder, so that a run that is moved can still read and write.

RUN/tokenizer/about.json               its kind, and the hash that the checkpoints of the run record
              vocab.json, merges.txt   (or tokenizer.json, tokenizer.model): its files, as transformers names them
RUN/tokenizer-1a2b3c4d5e6f/            one that the run had before, by the beginning of its hash
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

from megagpt.config import DataConfig
from megagpt.data.tokenizers.files import parse_json_object, read_tokenizer_file
from megagpt.data.tokenizers.tokenizer import KINDS, Tokenizer, build_tokenizer, named_files, tokenizer_of_run
from megagpt.errors import UserError
from megagpt.files import delete, os_reason, replace_text

FOLDER, ABOUT = "tokenizer", "about.json"
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja")


def keep(tokenizer: Tokenizer, run: Path) -> None:
    """Have the tokenizer in a run's folder; another one that is there is put beside it.

    Raises UserError where that cannot be written.
    """
    folder = run / FOLDER
    try:
        if (folder / ABOUT).is_file() and (was := _about(folder)) != (tokenizer.kind, tokenizer.sha256):
            delete(aside := _aside(run, was[1]))
            os.replace(folder, aside)
        if not (folder / ABOUT).is_file():
            temporary = folder.with_name(f"{FOLDER}.tmp")
            delete(temporary)
            temporary.mkdir()
            copy_files(tokenizer, temporary)
            for path in (path.with_name(name) for path in tokenizer.files[:1] for name in _BESIDE):
                if path.is_file():  # transformers' words on the tokenizer, which an export hands on
                    shutil.copyfile(path, temporary / path.name)
            describe(tokenizer, temporary)
            delete(folder)
            os.replace(temporary, folder)
    except OSError as error:
        raise UserError(
            f"cannot write {folder} ({os_reason(error)}); make room there or give another --save"
        ) from error


def copy_files(tokenizer: Tokenizer, folder: Path) -> None:
    """Copy a tokenizer's files into a folder, under the names that transformers looks for."""
    for option, path in zip(tokenizer.options, tokenizer.files, strict=False):
        shutil.copyfile(path, folder / option.name)


def describe(tokenizer: Tokenizer, folder: Path) -> None:
    """Write down beside the files of a tokenizer what they make."""
    about = {"tokenizer": tokenizer.kind, "sha256": tokenizer.sha256}
    replace_text(folder / ABOUT, json.dumps(about, indent=1) + "\n")


def tokenizer_of_checkpoint(
    run: Path, data: DataConfig, sha256: str | None, given: DataConfig | None = None
) -> Tokenizer | None:
    """The tokenizer that a checkpoint's run had: given by flags, or kept in its folder, or where its data lie.

    data, sha256: what the checkpoint records of data and tokenizer (None: of none).
    Returns None where the run had none.  Raises UserError where it had one that is not there, or is another one now.
    """
    if given is not None and given.tokenizer:
        return _same(build_tokenizer(given.tokenizer, **named_files(given)), sha256, "the flags name another tokenizer")
    for folder in (run / FOLDER, *((_aside(run, sha256),) if sha256 else ())):
        if (folder / ABOUT).is_file() and sha256 in (None, (about := _about(folder))[1]):
            return _same(_built(folder, about[0]), about[1], f"{folder}: a file has changed")
    found = tokenizer_of_run(_moved(data, run / FOLDER))
    if found is None and sha256 is not None:
        raise UserError(
            f"{run} was trained with a tokenizer (SHA-256 {sha256[:16]}…) that is neither in {run / FOLDER} nor where "
            "its data were; name it: --tokenizer KIND with its files"
        )
    return None if found is None else _same(found, sha256, "the data have another tokenizer now")


def _same(tokenizer: Tokenizer, sha256: str | None, otherwise: str) -> Tokenizer:
    if sha256 not in (None, tokenizer.sha256):
        names = ", ".join(map(str, tokenizer.files)) or tokenizer.kind
        raise UserError(
            f"{otherwise}: {names} has SHA-256 {tokenizer.sha256[:16]}…, the run was trained with {sha256[:16]}…; "
            "name that one: --tokenizer KIND with its files"
        )
    return tokenizer


def _about(folder: Path) -> tuple[str, str]:
    """Kind and hash."""
    path = folder / ABOUT
    about = parse_json_object(path, read_tokenizer_file(path))
    kind, sha256 = about.get("tokenizer"), about.get("sha256")
    if kind not in KINDS or not isinstance(sha256, str):
        raise UserError(f"{path}: names no tokenizer; delete {folder}, and name it: --tokenizer KIND with its files")
    return kind, sha256


def _built(folder: Path, kind: str) -> Tokenizer:
    return build_tokenizer(kind, **{option.key: str(folder / option.name) for option in KINDS[kind].options})


def _aside(run: Path, sha256: str) -> Path:
    return run / f"{FOLDER}-{sha256[:12]}"


def _moved(data: DataConfig, folder: Path) -> DataConfig:
    """The files that data names, or those of their names in that folder where they are gone: an import was moved."""
    names = {name: getattr(data, name) for name in ("tokenizer_model", "vocab_file", "merge_file")}
    found = {
        name: str(folder / Path(path).name)
        for name, path in names.items()
        if path and not Path(path).exists() and (folder / Path(path).name).exists()
    }
    return dataclasses.replace(data, **found)
