"""A checkpoint that is kept here, as a version of November 2026 wrote it (tp 2, dp 2, ZeRO 1), loads as it did then."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megagpt.checkpoint.folders import find
from megagpt.checkpoint.integrity import damage_of
from megagpt.config import ModelConfig, RunConfig
from megagpt.processes.local import run_ranks
from tests.parity.rank import LocalPart, batches_of, pieces_of, start_engine
from tests.parity.walk import Layout, merge, parity_config, spread_out

KEPT = Path(__file__).parent / "kept"
MODEL = ModelConfig(n_layers=2, d_model=8, n_heads=2, seq_len=8, vocab_size=33, d_ff=16, dropout_residual=0.1)
SAVED, LAST = 3, 6
LOSSES = [3.2896676063537598, 3.2068426609039307, 3.1380112171173096]  # of the run that wrote it, after it had


def config_of(layout: Layout) -> RunConfig:
    config = spread_out(parity_config(MODEL), layout)
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, warmup_steps=2, ema_decay=0.9),
        train=dataclasses.replace(config.train, train_steps=LAST),
    )


def go_on(config: RunConfig, dp: int) -> tuple[dict[str, list[LocalPart]], list[float]]:
    engine = start_engine(config, dp)
    state = engine.load(find(KEPT))
    assert (state.step, state.samples, state.validation_loss) == (SAVED, 24, 3.25)
    tensors = {key: pieces_of(engine, key) for key in engine.masters.kept}
    steps = [engine.train_step(s, batches_of(config, s, engine.mesh.data)) for s in range(SAVED, LAST)]
    engine.close()
    return tensors, [step.loss for step in steps]


def tensors_in(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The logical tensors by key and name, put together with json and safetensors alone."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensors in json.loads((folder / "index.json").read_text()).items():
        found[key] = {name: torch.full(logical["shape"], torch.nan) for name, logical in tensors.items()}
        for name, logical in tensors.items():
            for piece in logical["pieces"]:
                box = tuple(slice(s, s + n) for s, n in zip(piece["start"], piece["shape"], strict=True))
                found[key][name][box] = load_file(folder / piece["file"])[name]
    return found


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, dp=2, zero_stage=1, micro_batch_size=2),
        Layout(pp=2, micro_batch_size=4),
        Layout(dp=2, zero_stage=3),
    ],
    ids=str,
)
def test_a_run_goes_on_from_it_in_any_layout(layout):
    folder = find(KEPT)
    assert damage_of(folder) == []
    ranks = run_ranks(go_on, layout.world_size, config_of(layout), layout.dp)
    expected = tensors_in(folder)
    assert expected.keys() == {"weight", "exp_avg", "exp_avg_sq", "ema"} == ranks[0][0].keys()
    for key, tensors in expected.items():
        loaded = merge([rank[0][key] for rank in ranks])
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(loaded[name], tensor), (key, name)
    for _, losses in ranks:
        assert losses == pytest.approx(LOSSES, rel=1e-5)
