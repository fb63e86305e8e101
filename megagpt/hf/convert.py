"""Weights under transformers' names, both ways, by the table of an architecture: a tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megagpt.errors import UserError
from megagpt.hf.architecture import Architecture
from megagpt.hf.config import architecture_of, few
from megagpt.hf.correspondence import Correspondence, correspondences

if TYPE_CHECKING:
    from megagpt.config import ModelConfig

_BUFFERS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$|\.inv_freq$|\.embed_positions$|position_ids$")
"""What old files hold beside the weights."""


def lazy_from_hf(
    names: Iterable[str],
    read: Callable[[str], Tensor],
    config: ModelConfig,
    architecture: str | None = None,
    unused: Callable[[str], None] | None = None,
) -> dict[str, LazyTensor]:
    """The weights of a model of transformers under our canonical names, each read when it is asked for.

    names: theirs, with or without the prefix that a model without its head lacks; masks are left out.
    read: gives the tensor of one of them.
    architecture: a model_type; None takes the first that fits, as `hf_config` does.
    unused: told of tensors that the architecture has no place for; None refuses them.
    Raises UserError at once where a name is missing or unknown; for another shape when that tensor is asked for.
    """
    table = architecture_of(config, architecture)
    modules = table.modules(config)
    head, embedding = (str(modules[module]) for module in ("head.tokens", "embedding.tokens"))
    found = {as_written(name, table, head): name for name in names if not _BUFFERS.search(name)}
    if config.tied_embeddings:
        _drop_copy(found, read, f"{head}.weight", f"{embedding}.weight")
    pairs, what = list(correspondences(table, config)), f"a {table.name} of {config.n_layers} layers"
    if missing := [name for pair in pairs for name in pair.theirs if name not in found]:
        raise UserError(f"the weights have no {few(missing)}; wanted {what}; check the config")
    ours = {}
    for pair in pairs:
        as_given = [found.pop(name) for name in pair.theirs]
        for i, (name, shape) in enumerate(pair.ours.items()):
            ours[name] = LazyTensor(shape, partial(_to_ours, pair, as_given, read, i))
    if found and unused is not None:
        unused(f"note: {few(sorted(found))} left: {what} has no place for that (--allow-unused)")
    elif found:
        raise UserError(
            f"the weights hold {few(sorted(found))}, not in {what}; check the config, or leave that: --allow-unused"
        )
    return ours


def lazy_to_hf(
    read: Callable[[str], Tensor], config: ModelConfig, architecture: str | None = None
) -> dict[str, LazyTensor]:
    """Our logical tensors under the names of transformers' files; the exact inverse of `lazy_from_hf`.

    read: gives the tensor of a canonical name.
    With tied embeddings there is no output matrix, as in the files that transformers writes.
    Raises UserError where that architecture, or with None any, has no place for ours.
    """
    theirs = {}
    for pair in correspondences(architecture_of(config, architecture), config):
        for i, (name, shape) in enumerate(zip(pair.theirs, pair.their_shapes(), strict=True)):
            theirs[name] = LazyTensor(shape, partial(_to_theirs, pair, read, i))
    return theirs


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read and converted when it is asked for."""

    shape: tuple[int, ...]
    get: Callable[[], Tensor]


def _to_ours(pair: Correspondence, as_given: list[str], read: Callable[[str], Tensor], i: int) -> Tensor:
    theirs = [read(name) for name in as_given]
    for name, tensor, shape in zip(pair.theirs, theirs, pair.their_shapes(), strict=True):
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, wanted {shape}; check the model configuration")
    return pair.to_ours(theirs)[i]


def _to_theirs(pair: Correspondence, read: Callable[[str], Tensor], i: int) -> Tensor:
    return pair.to_theirs([read(name) for name in pair.ours])[i]


def as_written(name: str, table: Architecture, head: str) -> str:
    """The name of a tensor as transformers writes it into a file."""
    for other, written in table.renamed.items():
        if name.startswith(other):
            return written + name.removeprefix(other)
    return name if name.startswith((table.root, f"{head}.")) else table.root + name


def _drop_copy(found: dict[str, str], read: Callable[[str], Tensor], head: str, embedding: str) -> None:
    """Forget the copy of the embedding that some files hold as output matrix.  Raises UserError where it is none."""
    if head in found and embedding in found and not torch.equal(read(found.pop(head)), read(found[embedding])):
        raise UserError(f"{head} differs from {embedding}, but the model ties them; use tied_embeddings=False")
