"""A run that begins with the weights of a Hugging Face folder: safetensors only, a tensor in memory at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.checkpoint import folders
from megagpt.checkpoint.rewrite import new_folder, write_checkpoint
from megagpt.checkpoint.state import State
from megagpt.cli import to_yaml
from megagpt.config import DataConfig, ModelConfig, RunConfig, plain
from megagpt.data.tokenizers.tokenizer import KINDS, Tokenizer, tokenizer_of_run
from megagpt.errors import UserError
from megagpt.hf import LazyTensor, config_from_hf, lazy_from_hf
from megagpt.inventory.parameter import WEIGHT

_PREFERRED = ("gpt2", "hf", "sentencepiece")  # of several tokenizers that are there, the first is taken
SETTINGS = "tokenizer_config.json"  # beside their files; of ours, hf reads it
CHAT_TEMPLATE = "chat_template.jinja"  # likewise; the server reads it

_WHOLE, _SHARDS = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors")


def import_model(source: Path, out: Path) -> Path:
    """Write a run folder with a checkpoint of step 0 that holds weights only, its config.yaml, and tokenizer files.

    Raises UserError, and leaves nothing, where files are missing or pickles, the architecture or a tensor is not one
    that we know, a value is NaN or Inf, or `out` exists.
    """
    model, lazy = read_folder(source)

    def rows_of(key: str, name: str, rows: range) -> Iterable[np.ndarray]:
        yield lazy[name].get().numpy()[rows.start : rows.stop]

    with new_folder(out) as folder:
        data = _copy_tokenizer(source, folder / "tokenizer", out.resolve() / "tokenizer")
        at = State(
            step=0,
            samples=0,
            tokens=0,
            lr=0.0,
            counters={"skipped_steps": 0},
            config=plain(RunConfig(model=model, data=data)),
            data={},
            origin=f"import of {source.resolve().name}",
        )
        checkpoint = folders.folder_of(folder, 0)
        write_checkpoint(checkpoint, at, {WEIGHT: {name: tensor.shape for name, tensor in lazy.items()}}, rows_of)
        folders.point_to(checkpoint)
        (folder / "config.yaml").write_text(to_yaml(RunConfig(model=model)), encoding="utf-8")
    return folders.folder_of(out, 0)


def read_folder(source: Path) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """The model of a folder, and its weights under our names, each read when it is asked for.

    Raises UserError as `import_model` does, for values of a tensor when it is read.
    """
    architecture, model = _model_config(source / "config.json")
    places = _places(source)
    return model, lazy_from_hf(places, lambda name: _read(places[name], name), model, architecture)


def tokenizer_of(source: Path) -> Tokenizer | None:
    """The tokenizer of a folder, as it lies there; None where there is none."""
    kind = _kind_in(source)
    return tokenizer_of_run(_tokenizer_in(source, kind)) if kind else None


def _model_config(path: Path) -> tuple[str, ModelConfig]:
    """The model_type, and our configuration."""
    theirs = _read_json(path)
    try:
        return str(theirs.get("model_type")), config_from_hf(theirs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _places(source: Path) -> dict[str, Path]:
    """The file that each tensor lies in, by its name there."""
    if (source / _SHARDS).exists():
        weight_map = _read_json(source / _SHARDS).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError(f"{source / _SHARDS}: key weight_map is missing; fetch the model again")
        for name, file in weight_map.items():
            if not (isinstance(file, str) and _FILE.fullmatch(file)):
                raise UserError(f"{source / _SHARDS}: {name} lies in {file!r}, wanted a .safetensors file beside it")
        return {name: source / file for name, file in weight_map.items()}
    if (source / _WHOLE).exists():
        with _opened(source / _WHOLE) as file:
            return dict.fromkeys(file.keys(), source / _WHOLE)
    if pickled := [name for name in _PICKLES if (source / name).exists()]:
        raise UserError(
            f"{source / pickled[0]} is a pickle, which can run code when it is read; give a folder with {_WHOLE}: "
            "save_pretrained of transformers writes one"
        )
    raise UserError(f"{source} has neither {_WHOLE} nor {_SHARDS}; give the folder of a model")


def _read(path: Path, name: str) -> Tensor:
    """A tensor in fp32."""
    with _opened(path) as file:
        try:
            tensor = file.get_tensor(name).float()
        except SafetensorError as error:
            raise UserError(f"{path}: {name} cannot be read ({error}); fetch the model again") from None
    if not bool(tensor.isfinite().all()):
        raise UserError(f"{path}: {name} holds a NaN or Inf; give another model")
    return tensor


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch the model again") from None


def _copy_tokenizer(source: Path, copy: Path, final: Path) -> DataConfig:
    """Copy what makes a tokenizer, and how to name it once `copy` is called `final`. Raises where it is damaged."""
    kind = _kind_in(source)
    if kind is None:
        return DataConfig()
    files = [option.name for option in KINDS[kind].options]
    names = [*files, SETTINGS, CHAT_TEMPLATE] if kind == "hf" else files
    copy.mkdir()
    for name in names:
        if (source / name).exists():
            shutil.copyfile(source / name, copy / name)
    tokenizer_of_run(_tokenizer_in(copy, kind))
    return _tokenizer_in(final, kind)


def _kind_in(source: Path) -> str | None:
    """The kind of tokenizer whose files are all there."""
    files = {kind: [option.name for option in KINDS[kind].options] for kind in _PREFERRED}
    return next((kind for kind, names in files.items() if all((source / name).exists() for name in names)), None)


def _tokenizer_in(folder: Path, kind: str) -> DataConfig:
    """What names the tokenizer of that kind, of files in this folder."""
    settings = {"model": "tokenizer_model"}
    files = {settings.get(option.key, option.key): str(folder / option.name) for option in KINDS[kind].options}
    return DataConfig(tokenizer=kind, **files)  # pyright: ignore[reportArgumentType]  # a kind that it knows


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); fetch the model again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: got a {type(values).__name__}, wanted an object; fetch the model again")
    return values
