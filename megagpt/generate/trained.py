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
from megagpt.checkpoint.strict import STRICT, Allowed
from megagpt.cli import read_config
from megagpt.config import DataConfig, RunConfig
from megagpt.data.tokenizers.kept import tokenizer_of_checkpoint
from megagpt.data.tokenizers.tokenizer import Tokenizer
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
def open_trained(
    path: str | Path,
    fallback: bool = False,
    weights: Weights = "last",
    allowed: Allowed = STRICT,
    tokenizer: DataConfig | None = None,
) -> Iterator[Trained]:
    """Load the latest checkpoint of a run folder, another of its (RUN@best, RUN@STEP), or a checkpoint folder.

    fallback: where it is damaged, take the newest whole one before it. weights: the last ones, or their average.
    allowed: tensors that only one of checkpoint and model may have. tokenizer: names it where the run folder has none.
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
        together(lambda: load_weights(model, folder, key, allowed, say))
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        sha256 = state.data.get("tokenizer_sha256")
        found = together(lambda: tokenizer_of_checkpoint(folder.parent.parent, config.data, sha256, tokenizer))
        yield Trained(model, config, found, folder, state.step, mesh)
