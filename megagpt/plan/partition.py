"""Cut the layer list into pipeline stages: contiguous, a block each, the largest as small as can be."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from megagpt.config.values import Partition
from megagpt.errors import UserError, require
from megagpt.inventory.layers import Layer


def stage_bounds(partition: Partition, layers: Sequence[Layer], pp: int) -> tuple[int, ...]:
    """pp + 1 ascending indices into the layer list: stage s holds layers[bounds[s] : bounds[s + 1]].

    partition: flops | parameters | uniform (one weight a block), or explicit block counts "3,4,4,3".
    Raises: UserError where there are fewer blocks than stages, or the counts are not those of this model.
    """
    n_blocks = len(layers) - 2
    if n_blocks < pp:
        raise UserError(
            f"model.n_layers={n_blocks}",
            f"is fewer than parallel.pp={pp} stages",
            f"use --pp {n_blocks} or less, or --n-layers {pp} or more",
            ("model.n_layers", "parallel.pp"),
        )
    counts = _counts(partition, layers, pp)
    ends = list(accumulate(counts, initial=1))  # the embedding is layer 0 …
    return (0, *ends[1:-1], len(layers))  # … and the head goes with the last block


def _counts(partition: Partition, layers: Sequence[Layer], pp: int) -> list[int]:
    """Blocks of each stage."""
    embedding, *blocks, head = layers
    if partition.method == "uniform":
        return balance([1] * len(blocks), pp)
    if partition.method == "flops":
        weights = [layer.flops_per_token for layer in blocks]
        return balance(weights, pp, embedding.flops_per_token, head.flops_per_token)
    if partition.method == "parameters":
        weights = [layer.params for layer in blocks]
        # A tied output matrix is a second copy on the last stage: it weighs there as on the first.
        return balance(weights, pp, embedding.params, max(head.params, embedding.params))
    return _explicit(partition, len(blocks), pp)


def balance(weights: Sequence[int], pp: int, first: int = 0, last: int = 0) -> list[int]:
    """Sizes of contiguous groups, each at least 1, that minimise the largest group's weight.

    first and last are weights added to the first and the last group. Of equal solutions, one with the least sum of
    squares is taken: 7 blocks over 3 stages become 2, 2, 3 and not 1, 3, 3.
    """
    n = len(weights)
    sums = [0, *accumulate(weights[1:], initial=first + weights[0])]  # of the first i blocks, and `first`
    sums[n] += last
    most = _lightest_heaviest(sums, pp)
    furthest = _ends(sums, pp, most)  # ends of the groups, each as far as it may reach …
    backward = [sums[n] - total for total in reversed(sums)]
    nearest = [n - end for end in reversed(_ends(backward, pp, most))]  # … and as near as the others behind allow
    squares, cuts = {0: 0}, []
    for low, high in zip(nearest[1:], furthest[1:], strict=True):
        starts = _best_starts(sums, squares, low, high, most)
        cuts.append(starts)
        squares = {end: squares[start] + (sums[end] - sums[start]) ** 2 for end, start in starts.items()}
    counts, end = [], n
    for starts in reversed(cuts):
        counts.append(end - starts[end])
        end = starts[end]
    return counts[::-1]


def _lightest_heaviest(sums: Sequence[int], pp: int) -> int:
    """The least weight that pp groups need not exceed, by bisection."""
    n = len(sums) - 1
    low, high = -(-sums[n] // pp), sums[n]
    while low < high:
        middle = (low + high) // 2
        if _ends(sums, pp, middle)[-1] == n:
            high = middle
        else:
            low = middle + 1
    return low


def _ends(sums: Sequence[int], pp: int, most: int) -> list[int]:
    """pp + 1 block numbers at which groups end that take as many blocks as they may, and leave one for each other."""
    ends, n = [0], len(sums) - 1
    for others in reversed(range(pp)):
        ends.append(min(bisect_right(sums, sums[ends[-1]] + most) - 1, n - others))
    return ends


def _best_starts(sums: Sequence[int], squares: dict[int, int], low: int, high: int, most: int) -> dict[int, int]:
    """For each end in low … high, where a group of at most `most` begins that makes the least sum of squares.

    squares: that of the groups before, by where they end. A later end never wants an earlier start, so that halving
    the ends halves the starts to look at (Yao 1980's quadrangle inequality holds for squares).
    """
    found: dict[int, int] = {}
    open_ranges = [(low, high, min(squares), max(squares))]
    while open_ranges:
        low, high, first, last = open_ranges.pop()
        if low > high:
            continue
        end = (low + high) // 2
        reach = bisect_left(sums, sums[end] - most)
        starts = range(max(first, reach), min(last, end - 1) + 1)
        found[end] = best = min(starts, key=lambda start: squares[start] + (sums[end] - sums[start]) ** 2)
        open_ranges += [(low, end - 1, first, best), (end + 1, high, best, last)]
    return found


def _explicit(partition: Partition, n_blocks: int, pp: int) -> list[int]:
    counts, wanted = partition.counts, f"must have pp={pp} positive entries, of sum n_layers={n_blocks}"
    require(
        len(counts) == pp and sum(counts) == n_blocks and min(counts) >= 1,
        f"parallel.partition={partition}",
        f"{wanted}; it has {len(counts)} that sum to {sum(counts)}",
        f"use for example {','.join(map(str, balance([1] * n_blocks, pp)))}",
        "parallel.partition",
    )
    return list(counts)
