"""Cut the layer list into pipeline stages: contiguous, a block each, the largest as small as can be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megagpt.errors import UserError
from megagpt.plan.sizes import LayerSize

METHODS = ("flops", "parameters", "uniform")


def stage_bounds(partition: str, layers: Sequence[LayerSize], pp: int) -> tuple[int, ...]:
    """pp + 1 ascending indices into the layer list: stage s holds layers[bounds[s] : bounds[s + 1]].

    partition: flops | parameters | uniform (one weight a block), or explicit block counts "3,4,4,3".
    Raises: UserError where there are fewer blocks than stages, or `partition` is none of these.
    """
    n_blocks = len(layers) - 2
    if n_blocks < pp:
        raise UserError(
            f"model.n_layers={n_blocks} is fewer than parallel.pp={pp} stages; "
            f"use --pp {n_blocks} or less, or --n-layers {pp} or more"
        )
    counts = _counts(partition, layers, pp)
    ends = list(accumulate(counts, initial=1))  # the embedding is layer 0 …
    return (0, *ends[1:-1], len(layers))  # … and the head goes with the last block


def _counts(partition: str, layers: Sequence[LayerSize], pp: int) -> list[int]:
    """Blocks of each stage."""
    embedding, *blocks, head = layers
    if partition == "uniform":
        return balance([1] * len(blocks), pp)
    if partition == "flops":
        weights = [layer.flops_per_token for layer in blocks]
        return balance(weights, pp, embedding.flops_per_token, head.flops_per_token)
    if partition == "parameters":
        weights = [layer.params for layer in blocks]
        # A tied output matrix is a second copy on the last stage: it weighs there as on the first.
        return balance(weights, pp, embedding.params, max(head.params, embedding.params))
    return _explicit(partition, len(blocks), pp)


def balance(weights: Sequence[int], pp: int, first: int = 0, last: int = 0) -> list[int]:
    """Sizes of contiguous groups, each at least 1, that minimise the largest group's weight.

    first and last are weights added to the first and the last group. Of equal solutions, one with a small sum
    of squares is taken: 7 blocks over 3 stages become 2, 2, 3 and not 1, 3, 3.
    """
    n = len(weights)
    total = list(accumulate(weights, initial=0))

    def group(start: int, end: int) -> int:
        return total[end] - total[start] + (first if start == 0 else 0) + (last if end == n else 0)

    # best[end]: (largest weight, sum of squares, cuts) of the first `end` blocks split into `stages` groups.
    best = {end: (group(0, end), group(0, end) ** 2, [end]) for end in range(1, n - pp + 2)}
    for stages in range(2, pp + 1):
        best = {
            end: min(
                (max(most, weight), squares + weight**2, [*cuts, end])
                for start, (most, squares, cuts) in best.items()
                if start < end
                for weight in [group(start, end)]
            )
            for end in range(stages, n - pp + stages + 1)
        }
    cuts = best[n][2]
    return [end - start for start, end in zip([0, *cuts[:-1]], cuts, strict=True)]


def _explicit(partition: str, n_blocks: int, pp: int) -> list[int]:
    try:
        counts = [int(part) for part in partition.split(",")]
    except ValueError:
        raise UserError(
            f"parallel.partition={partition!r} is not known; use {', '.join(METHODS)}, "
            f"or block counts such as {_example(n_blocks, pp)}"
        ) from None
    if len(counts) != pp or sum(counts) != n_blocks or min(counts) < 1:
        raise UserError(
            f"parallel.partition={partition} must have pp={pp} positive entries, of sum n_layers={n_blocks}; "
            f"it has {len(counts)} that sum to {sum(counts)}; use for example {_example(n_blocks, pp)}"
        )
    return counts


def _example(n_blocks: int, pp: int) -> str:
    return ",".join(map(str, balance([1] * n_blocks, pp)))
