"""Evaluation over a split: replicas share it out, and ids that the model has not are told."""

from __future__ import annotations

from pathlib import Path

import pytest

from megagpt.config import ModelConfig, RunConfig
from megagpt.config.values import Split
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.errors import UserError
from megagpt.evaluate.split import Evaluation, evaluate
from megagpt.generate.stage import build_stage
from megagpt.generate.trained import Trained
from megagpt.parallel.mesh import Mesh, build_mesh, single_process_mesh
from megagpt.processes.local import run_ranks
from tests.tiny_data import VOCAB_SIZE, write_tiny_data

SPLIT = Split((0.9, 0.1, 0.0))


def found(prefix: str, mesh: Mesh, vocab_size: int = VOCAB_SIZE) -> tuple[Evaluation, int]:
    """What is found, and in how many passes of this replica."""
    model = ModelConfig(n_layers=1, d_model=16, n_heads=2, seq_len=32, vocab_size=vocab_size)
    stage, passes = build_stage(model, mesh), []
    stage.register_forward_hook(lambda *_: passes.append(1))
    trained = Trained(stage, RunConfig(model=model), None, Path(), 0)
    return evaluate(trained, IndexedDataset(prefix), split=SPLIT, which="validation"), len(passes)


def on_a_rank(prefix: str) -> tuple[Evaluation, int]:
    """With two replicas."""
    return found(prefix, build_mesh("cpu", pp=1, dp=2, tp=1))


def test_replicas_share_out_the_split(tmp_path: Path):
    prefix = write_tiny_data(tmp_path / "tiny")
    alone, n_passes = found(prefix, single_process_mesh())
    ranks = run_ranks(on_a_rank, 2, prefix)
    assert sum(n for _, n in ranks) == n_passes > 3 and abs(ranks[0][1] - ranks[1][1]) <= 1
    for together, _ in ranks:
        assert together.n_tokens == alone.n_tokens and together.loss == pytest.approx(alone.loss, rel=1e-6)
        assert together.bits_per_byte is None


def test_an_id_beyond_the_vocabulary_is_told(tmp_path: Path):
    with pytest.raises(UserError, match=r"tiny has token id \d+ wanted 0 to 63, the model's"):
        found(write_tiny_data(tmp_path / "tiny"), single_process_mesh(), vocab_size=64)
