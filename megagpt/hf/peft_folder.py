"""Adapters as a folder of transformers' companion `peft`, both ways: adapter_config.json and adapter_model.safetensors.

Of a matrix that both keep as one, A is the same, and the rows of B go as those of the weight do. Where they keep apart
what we keep in one (queries, keys, values; a gate and what it gates), each of theirs gets our A and its rows of B.
Where they keep in one what we keep apart (queries, and keys and values that heads share), theirs has both A, one below
the other, and B in blocks: twice the rank. The other way round the same holds: different A of what we keep in one
become one A of the sum of their ranks, with B in blocks. Nothing is lost, since B A stays; alpha follows the rank.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from megagpt.checkpoint.adapters import Adapters
from megagpt.config import LoraConfig
from megagpt.config.lora import TARGETS
from megagpt.errors import UserError
from megagpt.hf.architecture import Architecture
from megagpt.hf.architectures import ARCHITECTURES
from megagpt.hf.config import architecture_of, few
from megagpt.hf.convert import as_written
from megagpt.hf.correspondence import Correspondence, correspondences
from megagpt.hf.import_folder import names_in, read_json, read_tensor
from megagpt.inventory.layers import canonical
from megagpt.inventory.lora import PART, A, adapter
from megagpt.parallel.beginning import Beginning
from megagpt.parallel.parameter import Part

if TYPE_CHECKING:
    from megagpt.config import ModelConfig

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_WEIGHT = ".weight"

_READ = {"r", "lora_alpha", "use_rslora", "lora_dropout", "alpha_pattern", "rank_pattern", "init_lora_weights"}
_SAYS_NOTHING = {  # of what is added: who made it, how it began, which modules it is in, which the tensors say
    *("peft_type", "task_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "bias"),
    *("inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("fan_in_fan_out", "megatron_core", "qalora_group_size", "eva_config", "ensure_weight_tying", "runtime_config"),
}
_MERGE = "merge it into its base (merge_and_unload of peft), and import that folder"
_KEEP_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal")  # of init_lora_weights


@dataclass(frozen=True)
class Factors:
    """One adapter: B A, with the scale that A and B are multiplied with."""

    a: Tensor
    b: Tensor
    scale: float


def is_adapter_folder(path: Path) -> bool:
    """Whether a folder holds adapters of peft."""
    return (path / CONFIG).is_file()


def write_adapter_folder(
    folder: Path,
    lora: LoraConfig,
    adapters: Adapters,
    model: ModelConfig,
    architecture: str | None,
    base: str | None = None,
) -> str:
    """Write the two files, and return which architecture of transformers the adapters are for.

    architecture: a model_type; None takes the first that computes what the model does. base: whose weights they change.
    Raises UserError where there is no such architecture.
    """
    table = architecture_of(model, architecture)
    factors: dict[str, Factors] = {}
    for pair in _of_blocks(table, model):
        if all(name in adapters.a for name in pair.ours):
            factors |= _to_theirs(pair, adapters)
    tensors = {f"{_ROOT}{module}{_A}": f.a.contiguous() for module, f in factors.items()}
    tensors |= {f"{_ROOT}{module}{_B}": f.b.contiguous() for module, f in factors.items()}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    keys = _keys(lora, factors, table, base)
    (folder / CONFIG).write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return table.name


def read_adapter_folder(source: Path, model: ModelConfig, seed: int = 0) -> tuple[LoraConfig, Adapters]:
    """The adapters of a folder for a model of ours, and the settings of a run that goes on training them.

    All of ours have one rank, the largest that is needed; where theirs have a lower one, or a layer has none, the rest
    begins as in a new run of that seed: A as drawn, B of zeros.
    Raises UserError for what is no sum of W and B A, or is not of the matrices of this model's blocks.
    """
    keys = read_json(source / CONFIG)
    _require_plain(keys, source / CONFIG)
    given, table = _given(source, keys, model)
    found: dict[str, Factors] = {}
    for pair in _of_blocks(table, model):
        found |= _to_ours(pair, given)
    rank, rslora = max(1, *(len(factors.a) for factors in found.values())), bool(keys.get("use_rslora"))
    scale = _scale(keys, keys["lora_alpha"], keys["r"])
    lora = LoraConfig(
        rank=rank,
        alpha=scale * (math.sqrt(rank) if rslora else rank),
        rslora=rslora,
        dropout=keys.get("lora_dropout") or 0.0,
        targets=tuple(t for t, modules in TARGETS.items() if any(f".{m}." in n for m in modules for n in found)),
    )
    return lora, _of_one_rank(found, lora, model, seed)


def _of_blocks(table: Architecture, model: ModelConfig) -> list[Correspondence]:
    """Of the matrices that may have adapters. B has their rows, and is not turned where their weights are."""
    may = tuple(f".{module}{_WEIGHT}" for modules in TARGETS.values() for module in modules)
    pairs = correspondences(replace(table, transposed=False), model)
    return [pair for pair in pairs if all(name.endswith(may) for name in pair.ours)]


def _to_theirs(pair: Correspondence, adapters: Adapters) -> dict[str, Factors]:
    """By module of theirs."""
    ours = [Factors(adapters.a[name], adapters.b[name], adapters.scale) for name in pair.ours]
    uses = _uses(pair.to_theirs([_mark(f.b, i, len(ours)) for i, f in enumerate(ours)]))
    wide = pair.to_theirs(_side_by_side([f.b for f in ours]))
    found = {}
    for name, rows, used in zip(pair.theirs, wide, uses, strict=True):
        columns = _columns([f.a.shape[0] for f in ours], used)
        a = torch.cat([ours[i].a for i in used])
        found[name.removesuffix(_WEIGHT)] = Factors(a, rows[..., columns], adapters.scale)
    return found


def _to_ours(pair: Correspondence, given: Mapping[str, Factors]) -> dict[str, Factors]:
    """By weight of ours; nothing where none of theirs has an adapter. Scales are as theirs, which must be one."""
    theirs = [given.get(name.removesuffix(_WEIGHT)) for name in pair.theirs]
    if not any(theirs):
        return {}
    bs = []
    for name, f, (n_rows, n_inputs) in zip(pair.theirs, theirs, pair.their_shapes(), strict=True):
        if f is not None and (len(f.b), f.a.shape[1]) != (n_rows, n_inputs):
            got = f"{name.removesuffix(_WEIGHT)} is for a matrix of {(len(f.b), f.a.shape[1])}"
            raise UserError(
                f"the adapter of {got}, the base has one of {(n_rows, n_inputs)}; give the base it was made for"
            )
        bs.append(torch.zeros(n_rows, 0) if f is None else f.b * f.scale)
    uses = _uses(pair.to_ours([_mark(b, j, len(bs)) for j, b in enumerate(bs)]))
    wide = pair.to_ours(_side_by_side(bs))
    found = {}
    for name, b, used in zip(pair.ours, wide, uses, strict=True):
        a = torch.cat([f.a for j in used if (f := theirs[j]) is not None])
        b = b[..., _columns([b.shape[-1] for b in bs], used)]
        if len(pair.ours) > 1:  # of what they keep in one: without the directions of the other of ours
            kept = b.flatten(0, -2).any(0)
            a, b = a[kept], b[..., kept]
        found[name] = _without_repeats(a, b)
    return found


def _without_repeats(a: Tensor, b: Tensor) -> Factors:
    """Equal rows of A once, with the sum of their columns of B: of what we keep in one and they with one A."""
    rows, place = torch.unique(a, dim=0, return_inverse=True)
    if len(rows) == len(a):
        return Factors(a, b, 1.0)
    order = torch.unique(torch.tensor([int((place == place[i]).nonzero()[0]) for i in range(len(a))]))
    columns = torch.stack([b[..., place == place[first]].sum(-1) for first in order], dim=-1)
    return Factors(a[order], columns, 1.0)


def _side_by_side(bs: Sequence[Tensor]) -> list[Tensor]:
    """Each with zeros for the columns of the others: B in blocks."""
    ranks = [b.shape[-1] for b in bs]
    wide = [b.new_zeros(*b.shape[:-1], sum(ranks)) for b in bs]
    for i, (w, b) in enumerate(zip(wide, bs, strict=True)):
        w[..., _columns(ranks, [i])] = b
    return wide


def _columns(ranks: Sequence[int], blocks: Sequence[int]) -> Tensor:
    """The columns of these blocks."""
    starts = [sum(ranks[:i]) for i in range(len(ranks))]
    return torch.cat([torch.arange(starts[i], starts[i] + ranks[i]) for i in blocks])


def _mark(b: Tensor, i: int, n: int) -> Tensor:
    """Ones in column i of n, for as many rows: what `_uses` finds again."""
    marks = torch.zeros(*b.shape[:-1], n)
    marks[..., i] = 1
    return marks


def _uses(marked: Sequence[Tensor]) -> list[list[int]]:
    """For each result the inputs that it has rows of."""
    return [marks.flatten(0, -2).any(0).nonzero().flatten().tolist() for marks in marked]


def _of_one_rank(found: Mapping[str, Factors], lora: LoraConfig, model: ModelConfig, seed: int) -> Adapters:
    assert lora.rank is not None
    declared, a, b = canonical(model), {}, {}
    may = tuple(f".{module}{_WEIGHT}" for target in lora.targets for module in TARGETS[target])
    for name, weight in declared.items():
        if not (name.startswith("blocks.") and name.endswith(may)):
            continue
        first, second = adapter(weight, lora.rank).values()
        whole, its_name = Part(first.shape, dim=None, start=0, length=0), f"{name.removesuffix(_WEIGHT)}.{PART}.{A}"
        a[name] = torch.empty(first.shape)
        Beginning(first.init, whole, first.shape, seed, its_name).fill(a[name].view(-1))
        b[name] = torch.zeros(second.shape)
        if name in found:
            a[name][: len(found[name].a)] = found[name].a
            b[name][..., : len(found[name].a)] = found[name].b / lora.scale
    return Adapters(lora.scale, a, b)


def _keys(lora: LoraConfig, factors: Mapping[str, Factors], table: Architecture, base: str | None) -> dict[str, Any]:
    """adapter_config.json. Modules are named without the number of their block: all blocks are alike."""
    ranks = {_in_block(module): f.a.shape[0] for module, f in factors.items()}
    other = {name: rank for name, rank in ranks.items() if rank != lora.rank}
    times = math.sqrt if lora.rslora else float
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": _whole(lora.alpha),
        "use_rslora": lora.rslora,
        "lora_dropout": lora.dropout,
        "target_modules": sorted(ranks),
        "rank_pattern": other,
        "alpha_pattern": {name: _whole(lora.scale * times(rank)) for name, rank in other.items()},
        "fan_in_fan_out": table.transposed,
        "bias": "none",
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _in_block(module: str) -> str:
    """transformer.h.0.attn.c_attn → attn.c_attn."""
    return re.split(r"\.[0-9]+\.", module, maxsplit=1)[-1]


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _require_plain(keys: Mapping[str, Any], path: Path) -> None:
    """Raises UserError for adapters that are more than W + scale B A, or beside a W that is not the base's."""
    kind = keys.get("peft_type")
    if kind != "LORA":
        raise UserError(f"{path} has peft_type={kind!r}, wanted LORA; other adapters have no place here")
    if keys.get("bias", "none") != "none":
        raise UserError(
            f"{path} has bias={keys['bias']!r}: biases were trained too; merge it (merge_and_unload of peft)"
        )
    if (init := keys.get("init_lora_weights", True)) not in _KEEP_THE_BASE:
        raise UserError(
            f"{path} has init_lora_weights={init!r}, which changed the base's weights too; save it relative to the "
            f"base (save_pretrained of peft, path_initial_model_for_weight_conversion), or {_MERGE}"
        )
    for key, value in keys.items():
        if key not in _READ | _SAYS_NOTHING and value not in (None, False, 0, [], {}, ""):
            raise UserError(f"{path} has {key}={value!r}, with which more than W + scale B A is computed; {_MERGE}")
    for key in ("r", "lora_alpha"):
        if not isinstance(keys.get(key), int | float) or isinstance(keys[key], bool) or keys[key] <= 0:
            raise UserError(f"{path} has {key}={keys.get(key)!r}, wanted a number above 0")


def _given(source: Path, keys: Mapping[str, Any], model: ModelConfig) -> tuple[dict[str, Factors], Architecture]:
    """The adapters by module of transformers, as written here; and the architecture, of those that fit the model."""
    path, fits = source / WEIGHTS, []
    if not path.exists() and (source / "adapter_model.bin").exists():
        raise UserError(f"{source / 'adapter_model.bin'} is a pickle, which can run code when it is read; save it anew")
    names = names_in(path)
    if strange := [name for name in names if not (name.startswith(_ROOT) and name.endswith((_A, _B)))]:
        raise UserError(
            f"{path} holds {few(strange)}, beside A and B of linear layers: modules that were trained whole, "
            f"embeddings, magnitudes or biases have no place here; {_MERGE}"
        )
    for name in ARCHITECTURES:
        try:
            fits.append(architecture_of(model, name))
        except UserError:
            continue
    unknown: list[str] = []
    for table in fits:
        modules = {_module(name, table, model): name for name in names}
        may = {n.removesuffix(_WEIGHT) for pair in _of_blocks(table, model) for n in pair.theirs}
        unknown = unknown or sorted(modules.keys() - may)
        if modules.keys() <= may:
            return {m: _factors(path, name, keys, m) for m, name in modules.items()}, table
    which = f"a {fits[0].name} of {model.n_layers} layers" if fits else "an architecture that transformers has not"
    raise UserError(f"{path} has adapters of {few(unknown)}; the base, {which}, has no such matrices in its blocks")


def _module(name: str, table: Architecture, model: ModelConfig) -> str:
    head = str(table.modules(model)["head.tokens"])
    return as_written(name.removeprefix(_ROOT).removesuffix(_A).removesuffix(_B), table, head)


def _factors(path: Path, name: str, keys: Mapping[str, Any], module: str) -> Factors:
    stem = name.removesuffix(_A).removesuffix(_B)
    a, b = read_tensor(path, stem + _A), read_tensor(path, stem + _B)
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise UserError(f"{path}: {stem} has A {tuple(a.shape)} and B {tuple(b.shape)}, wanted (r, I) and (O, r)")
    alphas = keys.get("alpha_pattern") or {}
    try:
        alpha = next((v for key, v in alphas.items() if re.match(rf"(.*\.)?({key})$", module)), keys["lora_alpha"])
    except re.error as error:
        raise UserError(f"{path.with_name(CONFIG)}: alpha_pattern has a name that is none ({error})") from None
    return Factors(a, b, _scale(keys, alpha, a.shape[0]))


def _scale(keys: Mapping[str, Any], alpha: float, rank: int) -> float:
    return alpha / (math.sqrt(rank) if keys.get("use_rslora") else rank)
