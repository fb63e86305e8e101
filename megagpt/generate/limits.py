"""How much of a cache there is: planned before it is made, and said."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megagpt.errors import UserError, require
from megagpt.generate.request import Request
from megagpt.inventory.attention import cached_numbers

if TYPE_CHECKING:
    from megagpt.generate.stage import Stage

ROWS = 16
SHARE = 0.8  # of the memory that is free
GIB = 1 << 30


@dataclass(frozen=True)
class Limits:
    """n_rows: texts that are in the cache at once; others wait.  n_places: tokens of one, at most the model's seq_len.

    chunk: tokens of a prompt that go through the model in one pass.
    """

    n_rows: int = ROWS
    n_places: int = 1024
    chunk: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            require(value >= 1, f"got {field.name}={value} for the cache", "wanted 1 or more", f"change {field.name}")


def limits_for(stage: Stage, requests: Iterable[Request] = (), n_rows: int = ROWS) -> Limits:
    """Rows as long as the longest of these requests needs, no more than there are; without any, of the whole context.

    Raises UserError where the memory that is free does not hold one; takes fewer where it does not hold all.
    Comm: an all-reduce of a number over the ranks of the model, since all must take in the same texts.
    """
    requests, seq_len = list(requests), stage.config.seq_len
    longest = places_for(requests, seq_len)
    wanted = min(n_rows, sum(request.sampling.n_samples for request in requests) or n_rows)
    per_row = row_bytes(stage, longest)
    fitting = least(int(SHARE * free_bytes(stage.weight.device)) // per_row, stage)
    if fitting == 0:
        raise UserError(
            f"got a cache of {longest:,} tokens a text, {per_row / GIB:.2f} GiB",
            f"is more than the {free_bytes(stage.weight.device) / GIB:.2f} GiB of memory that are free",
            "take a shorter context, more processes, or --precision bf16",
        )
    return Limits(min(wanted, fitting), longest)


def least(value: int, stage: Stage) -> int:
    """The least that any rank of a model has.  Comm: an all-reduce of a number over the model and the pipe axis."""
    found = torch.tensor(value, device=stage.weight.device)
    for axis in (stage.mesh.model, stage.mesh.pipe):
        if axis.size > 1:
            dist.all_reduce(found, op=dist.ReduceOp.MIN, group=axis.group)
    return int(found)


def described(stage: Stage, limits: Limits) -> str:
    """For the start of a program."""
    per_row = row_bytes(stage, limits.n_places)
    return (
        f"cache: {limits.n_rows} texts of {limits.n_places:,} tokens, {limits.n_rows * per_row / GIB:.2f} GiB "
        f"({per_row / (1 << 20):.1f} MiB a text) on this rank"
    )


def row_bytes(stage: Stage, n_places: int) -> int:
    """What this rank keeps of one text."""
    tp, size = stage.mesh.model.size, stage.weight.element_size()
    return sum(cached_numbers(stage.config, layer, tp, n_places) * size for layer in stage.blocks)


def free_bytes(device: torch.device) -> int:
    """Memory that is free there; that of a host is shared by its ranks."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    n_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // n_ranks


def places_for(requests: Iterable[Request], seq_len: int) -> int:
    """Tokens of the longest text that these may become; the whole context without any."""
    lengths = [len(request.prompt) + request.sampling.n_tokens for request in requests]
    return min(seq_len, max(lengths, default=seq_len))
