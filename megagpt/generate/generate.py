"""Texts of many prompts at once, in any layout: what the command, evaluation and samples during training share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from megagpt.data.tokenizers.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.generate.engine import Engine
from megagpt.generate.limits import Limits, limits_for
from megagpt.generate.request import Completion, Piece, Request, Sampling
from megagpt.generate.trained import Trained, Weights, open_trained

DEFAULT = Sampling()
Prompt = str | Sequence[int]
"""Text, or token ids."""


def generate(
    load: str | Path,
    prompts: Sequence[Prompt],
    sampling: Sampling = DEFAULT,
    *,
    limits: Limits | None = None,
    weights: Weights = "last",
    pp: int = 1,
    dp: int = 1,
    precision: str = "fp32",
) -> list[list[Completion]]:
    """Open a model, let it go on from each prompt, and close it: by prompt, its samples.

        generate("runs/a", ["def main():"], Sampling(n_tokens=40, temperature=0))[0][0].text

    load: a run, RUN@best, RUN@STEP, a checkpoint, or a folder of transformers.  limits: as in `complete`.  Prompt i is
    drawn with seed + i.  Other arguments are those of `open_trained`.
    Under torchrun or deepspeed each process calls this alike, and gets all texts.
    Raises UserError where the model or a prompt is none.
    """
    with open_trained(load, weights=weights, pp=pp, dp=dp, precision=precision) as trained:
        return complete(trained, prompts, sampling, limits=limits)


def complete(
    trained: Trained,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    *,
    limits: Limits | None = None,
    show: Callable[[int, Piece], None] = lambda prompt, piece: None,
) -> list[list[Completion]]:
    """`generate` with a model that is open.

    limits: of the cache; None: 16 rows, as long as these prompts need.
    show: told each piece as it comes, with the number of its prompt: of the prompts of this replica.
    Comm: those of the engine; with replicas, which share out the prompts, one all-gather of the texts.
    """
    data, mine = trained.mesh.data, {}
    for i in range(data.rank, len(prompts), data.size):
        seeded = replace(sampling, seed=(sampling.seed + i) % 2**64)
        mine[i] = request_of(prompts[i], seeded, trained.tokenizer)
    engine = Engine(trained.stage, limits or limits_for(trained, mine.values()), trained.tokenizer)
    numbers = {engine.add(request): i for i, request in mine.items()}
    texts = {i: [Completion() for _ in range(sampling.n_samples)] for i in numbers.values()}
    while not engine.idle:
        for piece in engine.step():
            texts[numbers[piece.request]][piece.sample].add(piece)
            show(numbers[piece.request], piece)
    if data.size > 1:
        gathered: list[dict[int, list[Completion]]] = [{}] * data.size
        dist.all_gather_object(gathered, texts, group=data.group)
        texts = {i: found for part in gathered for i, found in part.items()}
    return [texts[i] for i in range(len(prompts))]


def request_of(prompt: Prompt, sampling: Sampling, tokenizer: Tokenizer | None) -> Request:
    """A prompt as the engine takes it; an empty text begins with the end of another one.

    Raises UserError for a text without a tokenizer.
    """
    eod = tokenizer.eod if tokenizer else None
    ends = () if eod is None else (eod,)
    if not isinstance(prompt, str):
        return Request(tuple(prompt), sampling, ends)
    if tokenizer is None:
        raise UserError("got a prompt as text", "but the model has no tokenizer", "give token ids", ("prompt",))
    return Request(tuple(tokenizer.encode(prompt)) or ends, sampling, ends)
