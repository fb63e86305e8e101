"""What a rank is called in messages. No torch: the processes that watch over the ranks do without."""

from __future__ import annotations


def rank_name(rank: int, *, dp: int, tp: int) -> str:
    """Any process in mesh terms, for messages."""
    return f"rank {rank} (pipe {rank // (dp * tp)}, data {rank // tp % dp}, model {rank % tp})"
