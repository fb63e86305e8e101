"""Log-probabilities of continuations after their contexts: what tasks with given answers ask of a model.

A few long pairs and many short ones fill a pass alike: those of about one length are read together, and those that
begin alike, as answers to one question do, side by side: the engine reads their beginning once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from megagpt.errors import UserError
from megagpt.generate.batching import common
from megagpt.generate.complete import answer, dealt
from megagpt.generate.request import Piece, Request, Sampling

if TYPE_CHECKING:
    from megagpt.generate.stage import Stage

Pair = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, one at least, and of what follows it, one at least."""

TOKENS = 4096  # that are read together, about
PLACES = 16384  # of the cache, which holds them with all that precedes them


@dataclass(frozen=True)
class Score:
    """logprob: of the whole continuation, in nats.  greedy: whether each of its tokens is the likeliest one."""

    logprob: float
    greedy: bool


def score(
    stage: Stage, pairs: Sequence[Pair], progress: Callable[[int, int], None] = lambda done, total: None
) -> list[Score]:
    """Of each pair; where both together are longer than the context, its beginning is cut off, as lm-eval does.

    progress is told, after each pair, how many are done, and how many this replica reads; equal ones count once.
    Comm: those of `answer`, once for each power of two that lengths lie between.
    Raises UserError for a continuation that the context does not hold, or an empty one.
    """
    asked = [request_of_pair(pair, stage.config.seq_len) for pair in pairs]
    keys = [(request.prompt, request.sampling.first_scored) for request in asked]
    distinct = dict(zip(keys, asked, strict=True))  # what comes twice is read once
    lots = by_length(distinct.values())
    data, n_done = stage.mesh.data, 0
    total = sum(len(dealt(len(some), data)) for some in lots)

    def show(_: int, piece: Piece) -> None:
        nonlocal n_done
        if piece.finish:
            n_done += 1
            progress(n_done, total)

    found: dict[object, Score] = {}
    for some in lots:
        texts = answer(stage, None, some, n_rows=rows_for(some), show=show)
        for request, (text,) in zip(some, texts, strict=True):
            entries = text.prompt_logprobs
            logprob = sum(entry.logprob or 0.0 for entry in entries)
            greedy = all(entry.token == entry.likeliest[0][0] for entry in entries)
            found[request.prompt, request.sampling.first_scored] = Score(logprob, greedy)
    return [found[key] for key in keys]


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


def rows_for(requests: Sequence[Request]) -> int:
    """As many as bring TOKENS to a pass, of which each reads what its neighbour before it does not, and PLACES hold."""
    lengths = [len(request.prompt) for request in requests]
    shared = (common(one.prompt, other.prompt) for one, other in pairwise(requests))
    wanted = TOKENS * len(requests) // (sum(lengths) - sum(shared))
    return max(1, min(wanted, PLACES // max(lengths)))


def request_of_pair(pair: Pair, n_places: int) -> Request:
    """The model reads all but the last token, so that there is room for one more than its context holds."""
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
