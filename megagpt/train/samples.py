"""Texts that a model writes while it is trained, with the weights that it has at that step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megagpt.generate.complete import complete, request_of
from megagpt.generate.limits import Limits, places_for
from megagpt.generate.request import Sampling
from megagpt.generate.stage import Stage
from megagpt.parallel.axis import SINGLE

if TYPE_CHECKING:
    from megagpt.data.tokenizers.tokenizer import Tokenizer
    from megagpt.train.step.engine import Engine

SAMPLING = Sampling(temperature=0.8, top_k=50, slide=True)


@dataclass(frozen=True)
class Sample:
    """A prompt of log.sample_prompts, and what the model made of it."""

    prompt: str
    text: str


def write_samples(engine: Engine, tokenizer: Tokenizer | None) -> list[Sample]:
    """Go on from each prompt; the same on every rank. The draws follow from the run's seed, and not from the step.

    Replicas write the same, each by itself: where ZeRO 3 shards the weights, all of them gather these together.
    Comm: that of the engine.
    """
    config, log = engine.config, engine.config.log
    stage = Stage(config.model, replace(engine.mesh, data=SINGLE), engine.backend.layers)
    sampling = replace(SAMPLING, n_tokens=log.sample_tokens, seed=config.train.seed)
    requests = [request_of(prompt, sampling, tokenizer) for prompt in log.sample_prompts]
    limits = Limits(n_rows=len(requests), n_places=places_for(requests, config.model.seq_len))
    stage.eval()
    texts = complete(stage, tokenizer, log.sample_prompts, sampling, limits=limits)
    stage.train()
    return [Sample(prompt, text.text) for prompt, (text,) in zip(log.sample_prompts, texts, strict=True)]
