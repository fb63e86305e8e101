"""Failing together: what goes wrong on one rank ends all of them, with one message, from the rank that knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

from megagpt.errors import UserError

T = TypeVar("T")


class RankError(UserError):
    """A `UserError` that all ranks raise together; on one of them `speaks` is true."""


def together(function: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run function on every rank; if it raises UserError on any, raise that error on all.

    group: all ranks; one of its own for a thread beside the training.
    Comm: one all-gather of short objects. The lowest rank that failed prints the message.
    """
    result, message = None, None
    try:
        result = function()
    except UserError as error:
        message = str(error)
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message, group=group)
    for rank, text in enumerate(messages):
        if text is not None:
            raise RankError(text, speaks=rank == dist.get_rank())
    return result  # type: ignore[return-value]
