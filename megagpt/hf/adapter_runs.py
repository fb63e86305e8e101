"""From a run's adapters to a folder of `peft`, and from such a folder to a run that goes on training them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from megagpt.checkpoint import folders
from megagpt.checkpoint.adapters import Adapters, lora_of, read_adapters, weights_sha256
from megagpt.checkpoint.rewrite import new_folder, write_checkpoint
from megagpt.checkpoint.state import NAME, State, read_state
from megagpt.cli import read_config, to_yaml
from megagpt.config import ModelConfig, RunConfig, plain
from megagpt.data.tokenizers.kept import keep, tokenizer_of_checkpoint
from megagpt.errors import UserError
from megagpt.hf.peft_folder import read_adapter_folder, write_adapter_folder
from megagpt.inventory.layers import canonical
from megagpt.inventory.lora import PART, A, B
from megagpt.inventory.parameter import WEIGHT
from megagpt.parallel.parameter import Part

ALLOWED = 1e-5  # of what a weight has added, as a share of the largest: round-off of a scale


def export_adapter(source: Path, out: Path, architecture: str | None = None, base: str | None = None) -> str:
    """Write the adapters of a checkpoint alone, as the folder of peft; returns the architecture that they are for.

    architecture: a model_type; None takes the first that computes what the model does.  base: the name by which
    transformers loads the model that they change.
    Raises UserError, and leaves nothing, where the checkpoint holds none, the architecture has no place in
    transformers, what was written adds something else when it is read again, or `out` exists.
    """
    config, adapters = read_config(read_state(source).config, f"{source / NAME}"), read_adapters(source)
    with new_folder(out) as folder:
        written = write_adapter_folder(folder, config.lora, adapters, config.model, architecture, base)
        _, again = read_adapter_folder(folder, config.model)
        if wrong := different(adapters, again, config.model):
            raise UserError(f"{wrong}: what was written adds something else when it is read again: not exported")
    return written


def different(adapters: Adapters, others: Adapters, model: ModelConfig) -> str | None:
    """The first weight to which these add something else than those, beyond round-off; None where there is none."""
    declared = canonical(model)
    for name in adapters.a:
        part = Part(declared[name].shape, None, 0, 0)
        ours, theirs = adapters.added_to(name, part), others.added_to(name, part)
        if not torch.allclose(ours, theirs, rtol=0.0, atol=ALLOWED * float(ours.abs().max())):
            return name
    return None


def import_adapter(source: Path, base: str | Path, out: Path) -> Path:
    """Write a run folder with a checkpoint of step 0 that holds the adapters of a folder of peft, and its config.yaml.

    base: the run or checkpoint whose weights they change.
    Raises UserError, and leaves nothing, where they are no sum of W and B A, belong to another model, or `out` exists.
    """
    beside = folders.find(base)
    of_base = read_state(beside)
    if lora_of(of_base, beside) is not None:
        raise UserError(f"{beside} holds adapters and no weights; give a whole model: --base RUN")
    config = read_config(of_base.config, f"{beside / NAME}")
    lora, adapters = read_adapter_folder(source, config.model, config.train.seed)
    config = RunConfig(model=config.model, data=config.data, lora=replace(lora, base=str(beside.absolute())))
    sha256 = of_base.data.get("tokenizer_sha256")
    tokenizer = tokenizer_of_checkpoint(beside.parent.parent, config.data, sha256)
    factors = {A: adapters.a, B: adapters.b}
    tensors = {
        f"{name.removesuffix('.weight')}.{PART}.{leaf}": tensor.numpy()
        for leaf, of_weights in factors.items()
        for name, tensor in of_weights.items()
    }

    def rows_of(key: str, name: str, rows: range) -> Iterable[np.ndarray]:
        yield tensors[name][rows.start : rows.stop]

    with new_folder(out) as folder:
        at = State(
            step=0,
            samples=0,
            tokens=0,
            lr=0.0,
            counters={"skipped_steps": 0},
            config=plain(config),
            data={"tokenizer_sha256": sha256} if sha256 else {},
            origin=f"import of {source.resolve().name}",
            base_sha256=weights_sha256(beside),
        )
        checkpoint = folders.folder_of(folder, 0)
        write_checkpoint(checkpoint, at, {WEIGHT: {name: t.shape for name, t in tensors.items()}}, rows_of)
        folders.point_to(checkpoint)
        if tokenizer is not None:
            keep(tokenizer, folder)
        (folder / "config.yaml").write_text(to_yaml(replace(config, data=RunConfig().data)), encoding="utf-8")
    return folders.folder_of(out, 0)
