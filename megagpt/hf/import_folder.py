"""A run that begins with the weights of a Hugging Face folder: safetensors only, a tensor in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megagpt.checkpoint import folders
from megagpt.checkpoint.foreign import what_is
from megagpt.checkpoint.rewrite import new_folder, write_checkpoint
from megagpt.checkpoint.state import State
from megagpt.cli import to_yaml
from megagpt.config import DataConfig, ModelConfig, RunConfig, plain
from megagpt.data.tokenizers.kept import describe
from megagpt.errors import UserError
from megagpt.files import os_reason, placeholder
from megagpt.hf import LazyTensor, config_from_hf, lazy_from_hf
from megagpt.hf.tokenizer_folder import copy_tokenizer, find_tokenizer
from megagpt.inventory.parameter import WEIGHT

_WHOLE, _SHARDS = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_FILE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors")


def import_model(
    source: Path, out: Path, say: Callable[[str], None] = lambda line: None, *, allow_unused: bool = False
) -> Path:
    """Write a run folder with a checkpoint of step 0 that holds weights only, its config.yaml, and tokenizer files.

    say: told of weights that lie there and are not taken, and why there will be no tokenizer, where the folder's is not
    one that we have. allow_unused: leave tensors that the architecture has no place for.
    Raises UserError, and leaves nothing, where files are missing or pickles, the architecture or a tensor is not one
    that we know, a value is NaN or Inf, or `out` exists.
    """
    tokenizer, note = find_tokenizer(source)
    if note:
        say(f"note: without a tokenizer: {note}")
    model, lazy = read_folder(source, say, allow_unused=allow_unused)

    def rows_of(key: str, name: str, rows: range) -> Iterable[np.ndarray]:
        yield lazy[name].get().numpy()[rows.start : rows.stop]

    with new_folder(out) as folder:
        data = DataConfig()
        if tokenizer:
            data = copy_tokenizer(source, tokenizer, folder / "tokenizer", out.resolve() / "tokenizer")
            describe(tokenizer, folder / "tokenizer")
        at = State(
            step=0,
            samples=0,
            tokens=0,
            lr=0.0,
            counters={"skipped_steps": 0},
            config=plain(RunConfig(model=model, data=data)),
            data={"tokenizer_sha256": tokenizer.sha256} if tokenizer else {},
            origin=f"import of {source.resolve().name}",
        )
        checkpoint = folders.folder_of(folder, 0)
        write_checkpoint(checkpoint, at, {WEIGHT: {name: tensor.shape for name, tensor in lazy.items()}}, rows_of)
        folders.point_to(checkpoint)
        (folder / "config.yaml").write_text(to_yaml(RunConfig(model=model)), encoding="utf-8")
    return folders.folder_of(out, 0)


def read_folder(
    source: Path, say: Callable[[str], None], *, allow_unused: bool = False
) -> tuple[ModelConfig, dict[str, LazyTensor]]:
    """The model of a folder, and its weights under our names, each read when it is asked for.

    Raises UserError as `import_model` does, for values of a tensor when it is read.
    """
    _refuse_other_folders(source)
    architecture, model = _model_config(source / "config.json")
    places = _places(source, say)
    unused = say if allow_unused else None
    return model, lazy_from_hf(places, lambda name: read_tensor(places[name], name), model, architecture, unused)


def _refuse_other_folders(source: Path) -> None:
    """What is no model of transformers, said before a file is found missing."""
    if not (source / "config.json").is_file() and (foreign := what_is(source, importing=True)):
        raise UserError(foreign)
    if not source.is_dir():
        raise UserError(f"{source} is no folder; give the folder of a model, with config.json and {_WHOLE}")
    if (source / "adapter_config.json").exists():
        raise UserError(
            f"{source} holds an adapter (LoRA), which is a change of another model and no model; import it beside "
            "that: --base RUN"
        )
    if not any((source / name).exists() for name in (_WHOLE, _SHARDS)) and (
        shards := sorted(source.glob("model-*-of-*.safetensors"))
    ):
        raise UserError(
            f"{source} has {len(shards)} shards ({shards[0].name} …) and no {_SHARDS}, which says what lies in them; "
            "fetch that file of the model too"
        )


def _model_config(path: Path) -> tuple[str, ModelConfig]:
    """The model_type, and our configuration."""
    theirs = read_json(path)
    try:
        return str(theirs.get("model_type")), config_from_hf(theirs)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _places(source: Path, say: Callable[[str], None]) -> dict[str, Path]:
    """The file that each tensor lies in, by its name there: of two sets of weights, the one that transformers takes."""
    if (source / _WHOLE).exists():
        if (source / _SHARDS).exists():
            say(f"note: took {source / _WHOLE}, as transformers does, and not the weights that {_SHARDS} names")
        return dict.fromkeys(names_in(source / _WHOLE), source / _WHOLE)
    if (source / _SHARDS).exists():
        return _places_in_shards(source)
    if pickled := [name for name in _PICKLES if (source / name).exists()]:
        raise UserError(
            f"{source / pickled[0]} is a pickle, which can run code when it is read; give a folder with {_WHOLE}: "
            "save_pretrained of transformers writes one"
        )
    if others := sorted(path.name for path in source.glob("*.safetensors")):
        raise UserError(f"{source} has {others[0]}, wanted it under the name of {_WHOLE}; if it is all, rename it")
    raise UserError(f"{source} has neither {_WHOLE} nor {_SHARDS}; give the folder of a model")


def _places_in_shards(source: Path) -> dict[str, Path]:
    """What the index says, which the files must agree with: transformers takes all that lies in them."""
    weight_map = read_json(source / _SHARDS).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{source / _SHARDS}: key weight_map is missing; fetch the model again")
    for name, file in weight_map.items():
        if not (isinstance(file, str) and _FILE.fullmatch(file)):
            raise UserError(f"{source / _SHARDS}: {name} lies in {file!r}, wanted a .safetensors file beside it")
    for file in sorted(set(weight_map.values())):
        listed = {name for name, place in weight_map.items() if place == file}
        if differing := listed ^ set(names_in(source / file)):
            name = min(differing)
            says, not_so = (_SHARDS, "the file") if name in listed else ("the file", _SHARDS)
            raise UserError(
                f"{source / file}: {says} says that it has {name}, {not_so} does not; fetch the model again"
            )
    return {name: source / file for name, file in weight_map.items()}


def names_in(path: Path) -> list[str]:
    """Of the tensors of a safetensors file.  Raises UserError where it cannot be read."""
    with _opened(path) as file:
        return list(file.keys())


def read_tensor(path: Path, name: str) -> Tensor:
    """A tensor in fp32.  Raises UserError where it cannot be read, or holds a NaN or Inf."""
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
        with suppress(OSError), path.open("rb") as file:
            if pointer := placeholder(file.read(200)):
                raise UserError(f"{path}: {pointer}") from None
        raise UserError(f"{path}: cannot be read ({error}); fetch the model again") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file.  Raises UserError where there is none."""
    try:
        data = path.read_bytes()
        if pointer := placeholder(data):
            raise UserError(f"{path}: {pointer}")
        values = json.loads(data)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({os_reason(error)}); give the folder of a whole model") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); fetch the model again") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: got a {type(values).__name__}, wanted an object; fetch the model again")
    return values
