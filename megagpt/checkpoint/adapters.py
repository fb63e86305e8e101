"""Adapters beside a base: a checkpoint that holds them alone, whose base they are for, and the weights that both make.

A run with adapters saves what it trains, and that is all: its checkpoints are small, and name the checkpoint whose
weights they change, with the hash of these. Several runs may share one base, which none of them writes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megagpt.checkpoint import folders
from megagpt.checkpoint.integrity import read_sums, sums_text
from megagpt.checkpoint.load import first_of, read_part, require_same_settings
from megagpt.checkpoint.pieces import Reader
from megagpt.checkpoint.state import State, read_state
from megagpt.checkpoint.strict import require_same_names
from megagpt.cli.yaml_file import read_config
from megagpt.config import LoraConfig, RunConfig
from megagpt.errors import UserError
from megagpt.inventory.layers import canonical
from megagpt.inventory.lora import PART, A, B
from megagpt.inventory.parameter import WEIGHT
from megagpt.optim.segments import Elements, Segment
from megagpt.parallel.parameter import Named, Part


@dataclass(frozen=True)
class Adapters:
    """Those of a model: W becomes W + scale B A.  a, b: fp32 and whole, by the canonical name of W."""

    scale: float
    a: Mapping[str, Tensor]
    b: Mapping[str, Tensor]

    def added_to(self, name: str, part: Part) -> Tensor:
        """scale B A of a weight that has an adapter: a rank's part of it, without padding."""
        a, b, last = self.a[name], self.b[name], len(part.shape) - 1
        if (*b.shape[:-1], a.shape[-1]) != part.shape:
            raise UserError(
                f"the adapter of {name} is for {(*b.shape[:-1], a.shape[-1])}, and the weight is {part.shape}: they "
                "belong to another model"
            )
        if part.dim == last:
            a = part_of_inputs(part).take(a)
        elif part.dim is not None:
            b = replace(part, shape=tuple(b.shape)).take(b)
        return torch.matmul(b, a) * self.scale

    def merge_into(self, parameters: Iterable[Named]) -> None:
        """Add to the weights of a model, or a stage of it, whatever the layout.  Raises UserError for another model."""
        for named in parameters:
            if named.name in self.a:
                named.part.unpadded(named.parameter.data).add_(self.added_to(named.name, named.part))

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """A logical weight with what its adapter adds, where it has one."""
        if name not in self.a:
            return weight
        return weight + self.added_to(name, Part(tuple(weight.shape), None, 0, 0))


def part_of_inputs(part: Part) -> Part:
    """Of A, where the inputs of its weight are cut."""
    return Part((0, part.shape[-1]), 1, part.start, part.length)


def lora_of(at: State, folder: Path) -> LoraConfig | None:
    """The adapters that a checkpoint holds in place of weights; None for one of weights."""
    lora = at.config.get("lora", {})
    return read_config({"lora": lora}, f"{folder}/state.json").lora if lora.get("rank") is not None else None


def read_adapters(folder: Path, key: str = WEIGHT) -> Adapters:
    """Those of a checkpoint. key: "ema" for their average.  Raises UserError where it holds none."""
    at = read_state(folder)
    lora = lora_of(at, folder)
    if lora is None:
        raise UserError(f"{folder} holds weights and no adapters; give a run that was trained with --lora.rank")
    factors: dict[str, dict[str, Tensor]] = {A: {}, B: {}}
    with Reader(folder) as reader:
        if key not in reader.index:
            raise UserError(f"{folder} has no average of its adapters: its run had no --optim.ema-decay")
        for name in reader.index[key]:
            module, _, leaf = name.rpartition(f".{PART}.")
            factors[leaf][f"{module}.weight"] = torch.from_numpy(reader.read(key, name))
    return Adapters(lora.scale, factors[A], factors[B])


def require_adapted(adapters: Adapters, config: RunConfig, what: object) -> None:
    """Raise UserError where the model has no such weights."""
    require_same_names(Path(str(what)), "adapter", adapters.a, adapters.a.keys() & canonical(config.model).keys())


def base_from_load(config: RunConfig) -> RunConfig:
    """With adapters, a checkpoint of weights that --load means is the base: the run begins at its own first step.

    Raises UserError where the base is named twice.
    """
    load, fallback = config.checkpoint.load, config.checkpoint.load_fallback
    if config.lora.rank is None or load is None:
        return config
    try:
        folder = first_of(load, fallback)
        if lora_of(read_state(folder), folder) is not None:
            return config
    except UserError:  # damaged: for whoever goes on from it to say, or to pass over
        return config
    if config.lora.base is not None:
        got = f"--lora.base {config.lora.base} with --load {load}, which holds weights and no adapters"
        raise UserError(got, "are two bases", "leave out one", ["lora.base", "checkpoint.load"])
    return replace(config, lora=replace(config.lora, base=load), checkpoint=replace(config.checkpoint, load=None))


def find_base(config: RunConfig, at: State | None) -> RunConfig:
    """The configuration with the folder of the base's checkpoint. at: of the adapters that the run goes on from.

    Raises UserError where there is none, or not the one that they began with.
    """
    recorded = at.config["lora"]["base"] if at else None
    wanted = config.lora.base or recorded
    if wanted is None:
        got = f"lora.rank={config.lora.rank}"
        raise UserError(got, "adapts the weights of a trained model", "give --lora.base RUN", ["lora.base"])
    folder = folders.find(wanted)
    if at and at.base_sha256 and at.base_sha256 != weights_sha256(folder):
        raise UserError(
            f"the weights of {folder} are not those that these adapters were trained beside ({recorded}); give these: "
            "--lora.base"
        )
    return replace(config, lora=replace(config.lora, base=str(folder.absolute())))


def base_of(folder: Path) -> Path:
    """The checkpoint that the adapters of another one are for, where that was.  Raises UserError where it is gone."""
    at = read_state(folder)
    try:
        return Path(find_base(read_config(at.config, f"{folder}/state.json"), at).lora.base or "")
    except UserError as error:
        raise UserError(f"{folder} holds adapters, and their base is wanted too: {error}") from None


def weights_sha256(folder: Path) -> str:
    """One hash of all files of weights, as the checkpoint has written it down."""
    sums = {name: digest for name, digest in read_sums(folder).items() if name.startswith(f"{WEIGHT}-")}
    return hashlib.sha256(sums_text(sums).encode()).hexdigest()


def load_base(frozen: Iterable[Segment], config: RunConfig, set_weight: Callable[[Segment, Elements], None]) -> None:
    """Read the frozen weights of a model, or a stage of it, from `lora.base`, one part at a time.

    set_weight: see `Backend`.
    Comm: none.  Raises UserError where that is of another architecture, or holds no weights.
    """
    folder = folders.find(str(config.lora.base))
    at = read_state(folder)
    if lora_of(at, folder) is not None:
        raise UserError(f"{folder} holds adapters and no weights; give a whole model: --lora.base RUN")
    require_same_settings(config, at, folder, ["model"])
    with Reader(folder) as reader:
        require_same_names(folder, WEIGHT, reader.index.get(WEIGHT, {}), canonical(config.model))
        for segment in frozen:
            value = read_part(reader, WEIGHT, segment.named.name, segment.named.part)
            set_weight(segment, segment.elements_of(value))
