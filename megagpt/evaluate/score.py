"""Log-probabilities of continuations after their contexts: what tasks with given answers ask of a model.

A few long pairs and many short ones fill a pass alike: those of about one length are read together, and those that
begin alike, as answers to one question do, side by side: the engine reads their beginning once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from megagpt.errors import UserError
from megagpt.generate.batching import common
from megagpt.generate.complete import answer, dealt
from megagpt.generate.request import Completion, Piece, Request, Sampling

if TYPE_CHECKING:
    from megagpt.generate.stage import Stage

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, one at least, and of what follows it, one at least."""

TOKENS = 4096  # that are read together, about
PLACES = 16384  # of the cache, which holds them with all that precedes them
SLICE = 16 * TOKENS  # after which what is known by then is told


@dataclass(frozen=True, eq=False)
class Score:
    """Of each token of a continuation, in nats.

    logprobs: what the model gave it.  best: what it gave the likeliest token there.  hits: whether that is it.
    Shapes: [tokens of the continuation] each.
    """

    logprobs: np.ndarray
    best: np.ndarray
    hits: np.ndarray

    @property
    def logprob(self) -> float:
        """Of the whole continuation."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def greedy(self) -> bool:
        """Whether each of its tokens is the likeliest one."""
        return bool(self.hits.all())


def score(
    stage: Stage, pairs: Sequence[Pair], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Score]:
    """Of each pair; where both together are longer than the context, its beginning is cut off, as lm-eval does.

    progress: as in `scores_by_slice`; equal pairs count once.
    Comm, errors: those of `scores_by_slice` and `request_of_pair`.
    """
    asked = [request_of_pair(pair, stage.config.seq_len) for pair in pairs]
    distinct = {key_of(request): request for request in asked}  # what comes twice is read once
    found: dict[object, Score] = {}
    for requests, scores in scores_by_slice(stage, list(distinct.values()), progress):
        found |= zip(map(key_of, requests), scores, strict=True)
    return [found[key_of(request)] for request in asked]


def scores_by_slice(
    stage: Stage, requests: Sequence[Request], progress: Callable[[int, int], None] = lambda done, total: None
) -> Iterator[tuple[list[Request], list[Score]]]:
    """Those of `request_of_pair`, the longest first, in slices of some minutes at most; each is known on all ranks.

    progress is told, after each request, how many are done, and how many this replica reads.
    Comm: those of `answer`, once a slice.
    """
    slices = [some for lot in by_length(requests) for some in sliced(lot)]
    data, n_done = stage.mesh.data, 0
    total = sum(len(dealt(len(some), data)) for some in slices)

    def show(_: int, piece: Piece) -> None:
        nonlocal n_done
        if piece.finish:
            n_done += 1
            progress(n_done, total)

    for some in slices:
        texts = answer(stage, None, some, n_rows=rows_for(some), show=show)
        yield some, [_score_of(text) for (text,) in texts]


def _score_of(text: Completion) -> Score:
    entries = text.prompt_logprobs
    return Score(
        np.array([entry.logprob for entry in entries], dtype=np.float32),
        np.array([entry.likeliest[0][1] for entry in entries], dtype=np.float32),
        np.array([entry.likeliest[0][0] == entry.token for entry in entries], dtype=bool),
    )


def key_of(request: Request) -> tuple[tuple[int, ...], int]:
    """What makes two pairs' requests the same one."""
    return request.prompt, request.sampling.first_scored


def by_length(requests: Iterable[Request]) -> list[list[Request]]:
    """In lots of about one length, the longest first; in a lot neighbours share as much as they can.

    Texts that are the same for the most part stay together, whatever their lengths.
    """
    families: list[list[Request]] = []
    for request in sorted(requests, key=lambda request: request.prompt):
        last = families[-1][-1].prompt if families else ()
        if 2 * common(last, request.prompt) > len(last):
            families[-1].append(request)
        else:
            families.append([request])
    lots: dict[int, list[Request]] = defaultdict(list)
    for family in families:
        lots[max(len(request.prompt) for request in family).bit_length()] += family
    return [lots[size] for size in sorted(lots, reverse=True)]


def sliced(lot: Sequence[Request]) -> Iterator[list[Request]]:
    """A lot in order, cut where SLICE tokens are reached."""
    some: list[Request] = []
    n_tokens = 0
    for request in lot:
        some.append(request)
        n_tokens += len(request.prompt)
        if n_tokens >= SLICE:
            yield some
            some, n_tokens = [], 0
    if some:
        yield some


def rows_for(requests: Sequence[Request]) -> int:
    """As many as bring TOKENS to a pass, of which each reads what its neighbour before it does not, and PLACES hold."""
    lengths = [len(request.prompt) for request in requests]
    shared = (common(one.prompt, other.prompt) for one, other in pairwise(requests))
    wanted = TOKENS * len(requests) // (sum(lengths) - sum(shared))
    return max(1, min(wanted, PLACES // max(lengths)))


def request_of_pair(pair: Pair, n_places: int) -> Request:
    """The model reads all but the last token, so that there is room for one more than its context holds.

    Raises UserError for a continuation that the context does not hold, or an empty one.
    """
    context, continuation = pair
    if not (context and 0 < len(continuation) <= n_places):
        raise UserError(
            f"got a context of {len(context)} tokens and {len(continuation)} after it",
            f"wanted one or more, and 1 to {n_places:,}, the model's context",
            "shorten what is scored",
        )
    tokens = (*context, *continuation)[-(n_places + 1) :]
    first = len(tokens) - len(continuation)
    return Request(tokens, Sampling(n_tokens=0, logprobs=1, prompt_logprobs=True, first_scored=first))
