"""A run with a tokenizer and a model of random weights, written without training: what tests of the server load."""

from __future__ import annotations

from pathlib import Path

from megagpt.config import DataConfig, ModelConfig, RunConfig, plain
from tests.checkpoint.written_checkpoint import gpt2_tensors, write_checkpoint

MODEL = ModelConfig(n_layers=2, d_model=32, n_heads=2, seq_len=64, vocab_size=257)


def write_run(folder: Path, tokenizer: bool = True) -> str:
    """A small GPT-2 over bytes; its name as --load takes it."""
    data = DataConfig(tokenizer="bytes") if tokenizer else DataConfig()
    config = plain(RunConfig(model=MODEL, data=data))
    weights = {"weight": {name: 0.3 * values for name, values in gpt2_tensors(MODEL).items()}}
    write_checkpoint(folder, tensors=weights, config=config)
    return str(folder)
