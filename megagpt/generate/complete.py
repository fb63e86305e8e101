"""Texts of many prompts at once, in any layout: what the command, evaluation and samples during training share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch.distributed as dist

from megagpt.data.tokenizers.tokenizer import UNBOUND, Bounds
from megagpt.errors import UserError, require
from megagpt.generate.engine import Engine
from megagpt.generate.limits import ROWS, Limits, limits_for
from megagpt.generate.request import Completion, Piece, Request, Sampling
from megagpt.parallel.axis import Axis

if TYPE_CHECKING:
    from megagpt.data.tokenizers.tokenizer import Tokenizer
    from megagpt.generate.stage import Stage

Prompt = str | Sequence[int]
"""Text, or token ids."""


def complete(
    stage: Stage,
    tokenizer: Tokenizer | None,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    limits: Limits | None = None,
    show: Callable[[int, Piece], None] = lambda prompt, piece: None,
    bounds: Bounds = UNBOUND,
) -> list[list[Completion]]:
    """Let a model that is open go on from each prompt: by prompt, its samples.

    limits: of the cache; None: 16 rows, as long as these prompts need.
    show: told each piece as it comes, with the number of its prompt: of the prompts of this replica.
    bounds: those of the model (`Trained.bounds`).
    Comm: those of `answer`.
    """
    seeds = [replace(sampling, seed=(sampling.seed + i) % 2**64) for i in range(len(prompts))]
    requests = [request_of(prompt, seeded, tokenizer, bounds) for prompt, seeded in zip(prompts, seeds, strict=True)]
    return answer(stage, tokenizer, requests, limits=limits, show=show)


def answer(
    stage: Stage,
    tokenizer: Tokenizer | None,
    requests: Sequence[Request],
    *,
    limits: Limits | None = None,
    n_rows: int = ROWS,
    show: Callable[[int, Piece], None] = lambda request, piece: None,
) -> list[list[Completion]]:
    """What a model that is open makes of each request: by request, its samples; see `complete`.

    n_rows: of the cache, at most, where its limits are not given.
    Comm: those of the engine; with replicas, which share out the requests, one all-gather of the texts.
    """
    data = stage.mesh.data
    for request in requests:  # those of others too: what cannot be is refused on all ranks
        request.check(stage.config.vocab, limits.n_places if limits else stage.config.seq_len)
    mine = {i: requests[i] for i in dealt(len(requests), data)}
    engine = Engine(stage, limits or limits_for(stage, mine.values(), n_rows), tokenizer)
    numbers = {engine.add(request): i for i, request in mine.items()}
    texts = {i: [Completion() for _ in range(mine[i].sampling.n_samples)] for i in numbers.values()}
    while not engine.idle:
        for piece in engine.step():
            texts[numbers[piece.request]][piece.sample].add(piece)
            show(numbers[piece.request], piece)
    if data.size > 1:
        gathered: list[dict[int, list[Completion]]] = [{}] * data.size
        dist.all_gather_object(gathered, texts, group=data.group)
        texts = {i: found for part in gathered for i, found in part.items()}
    return [texts[i] for i in range(len(requests))]


def dealt(n: int, data: Axis) -> range:
    """Of n requests, those that this replica answers: neighbours, which may share their beginning."""
    return range(n * data.rank // data.size, n * (data.rank + 1) // data.size)


def request_of(prompt: Prompt, sampling: Sampling, tokenizer: Tokenizer | None, bounds: Bounds = UNBOUND) -> Request:
    """A prompt as the engine takes it: a text as the model has it begin; an empty one with the end of another.

    Raises UserError for a text without a tokenizer, or with parts of characters.
    """
    eod = tokenizer.eod if tokenizer else None
    end = () if eod is None else (eod,)
    if not isinstance(prompt, str):
        return Request(tuple(prompt), sampling, bounds.ends or end)
    if tokenizer is None:
        raise UserError("got a prompt as text", "but the model has no tokenizer", "give token ids", ("prompt",))
    whole = prompt == prompt.encode(errors="replace").decode()
    require(whole, f"got the prompt {prompt!r:.60}", "wanted whole characters", "give it as UTF-8", "prompt")
    return Request(bounds.begun(tokenizer.encode(prompt)) or end, sampling, bounds.ends or end)
