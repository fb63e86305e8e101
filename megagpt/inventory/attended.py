"""How many keys the queries of a sample attend under each pattern: what attention's FLOPs follow from."""

from __future__ import annotations

from megagpt.config.pattern import Pattern


def attended_pairs(pattern: Pattern, seq_len: int) -> int:
    """Pairs of a query and a key that it may attend, itself included, in a sample of `seq_len` tokens.

    Dense and causal: T (T + 1) / 2.  Closed forms of the sets that `Pattern` describes.
    """
    if pattern.kind == "window":
        (width,) = pattern.numbers
        return _window(width, seq_len)
    if pattern.kind == "strided":
        (stride,) = pattern.numbers
        strides, rest = divmod(seq_len, stride)
        further = stride * _triangle(strides - 1) + strides * rest  # t // stride keys beyond the last `stride`
        return _window(stride, seq_len) + further
    if pattern.kind == "bigbird":
        return _bigbird(pattern, seq_len)
    return _triangle(seq_len)


def _window(width: int, seq_len: int) -> int:
    full = max(seq_len - width, 0)
    return _triangle(seq_len - full) + full * width


def _bigbird(pattern: Pattern, seq_len: int) -> int:
    """Block b of queries attends min(b, window + first + random - 1) blocks before it, and its own causally."""
    block, window, first, random = pattern.numbers
    blocks, rest = divmod(seq_len, block)
    most = window + first + random - 1
    growing = min(blocks, most)
    before = _triangle(growing - 1) + (blocks - growing) * most
    return block * block * before + rest * block * min(blocks, most) + blocks * _triangle(block) + _triangle(rest)


def _triangle(n: int) -> int:
    return n * (n + 1) // 2
