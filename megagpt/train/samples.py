"""Texts that a model writes while it is trained, with the weights that it has at that step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from megagpt.generate.generate import complete
from megagpt.generate.limits import Limits
from megagpt.generate.request import Sampling
from megagpt.generate.stage import Stage
from megagpt.generate.trained import Trained
from megagpt.parallel.axis import SINGLE
from megagpt.train.run import Run
from megagpt.train.step.engine import Engine

SAMPLING = Sampling(temperature=0.8, top_k=50)


@dataclass(frozen=True)
class Sample:
    """A prompt of log.sample_prompts, and what the model made of it."""

    prompt: str
    text: str


def write_samples(run: Run, engine: Engine, step: int) -> list[Sample]:
    """Go on from each prompt; the same on every rank. The draws follow from the run's seed, and not from the step.

    Replicas write the same, each by itself: where ZeRO 3 shards the weights, all of them gather these together.
    Comm: that of the engine.
    """
    log, stage = run.config.log, Stage(run.config.model, replace(run.mesh, data=SINGLE), engine.backend.layers)
    trained = Trained(stage, run.config, run.tokenizer, Path(run.folder), step)
    sampling = replace(SAMPLING, n_tokens=log.sample_tokens, seed=run.config.train.seed)
    limits = Limits(n_rows=len(log.sample_prompts), n_places=run.config.model.seq_len)
    stage.eval()
    texts = complete(trained, log.sample_prompts, replace(sampling, slide=True), limits=limits)
    stage.train()
    return [Sample(prompt, text.text) for prompt, (text,) in zip(log.sample_prompts, texts, strict=True)]
