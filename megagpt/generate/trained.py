"""A trained model by the name of its run: for evaluation and generation, without an engine and on any layout."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from megagpt.checkpoint.load import find_whole, load_weights
from megagpt.checkpoint.state import read_state
from megagpt.cli import read_config
from megagpt.config import RunConfig
from megagpt.data.tokenizers.tokenizer import Tokenizer, tokenizer_of_run
from megagpt.inventory.parameter import AVERAGE, WEIGHT
from megagpt.model.gpt import GPT
from megagpt.parallel.mesh import Mesh
from megagpt.processes.agree import together
from megagpt.processes.launched import n_processes
from megagpt.processes.start import distributed

Weights = Literal["last", "ema"]


@dataclass(frozen=True)
class Trained:
    """A model in evaluation mode, and where it came from. The model is shared out over mesh.model."""

    model: GPT
    config: RunConfig
    tokenizer: Tokenizer | None
    folder: Path
    step: int
    mesh: Mesh

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.model.embedding.tokens.weight.device


@contextmanager
def open_trained(path: str | Path, fallback: bool = False, weights: Weights = "last") -> Iterator[Trained]:
    """Load the latest checkpoint of a run folder, another of its (RUN@best, RUN@STEP), or a checkpoint folder.

    fallback: where it is damaged, take the newest whole one before it. weights: the last ones, or their average.
    Started as several processes (torchrun), they share the model by tensor parallelism; started as one, it holds all.
    """
    key = AVERAGE if weights == "ema" else WEIGHT
    tp = n_processes()
    with distributed(pp=1, dp=1, tp=tp) as (mesh, _):
        say = partial(print, file=sys.stderr) if mesh.rank == 0 else lambda _: None
        folder = find_whole(path, fallback, say, newest_will_do=fallback, keys=[key])
        state = read_state(folder)
        config = read_config(state.config, f"{folder}/state.json")
        model = GPT(config.model, mesh.model)
        together(lambda: load_weights(model, folder, key))
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        tokenizer = tokenizer_of_run(config.data)
        yield Trained(model, config, tokenizer, folder, state.step, mesh)
