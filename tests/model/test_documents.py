"""Documents side by side in a row: each is trained as if it stood alone, whatever computes attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention as torchs_flex_attention

from megagpt.config import ModelConfig
from megagpt.config.kernels import Kernels
from megagpt.finetune.example import Document, Example, Examples
from megagpt.finetune.rows import PackedRows
from megagpt.inventory.attention import attention_lacks
from megagpt.model.attention import blocks
from megagpt.model.gpt import GPT
from megagpt.parallel.axis import SINGLE
from tests.tolerances import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

BASE = ModelConfig(n_layers=2, d_model=24, n_heads=4, seq_len=24, vocab_size=37, init_std=0.3)
LENGTHS = [9, 11, 4, 7, 16, 24, 1]
PACKED, ALONE = [[0, 1, 2], [3, 4], [5], [6]], [[i] for i in range(len(LENGTHS))]
PATTERNS = ["dense", "window:5", "strided:4", "bigbird:3:2:1:1"]
POSITIONS = ["none", "learned", "sinusoidal", "rotary", "alibi", "t5", "transformer_xl"]


def documents() -> Examples:
    random = np.random.default_rng(0)
    found = []
    for length in LENGTHS:
        counts = random.random(length) < 0.6
        found.append(Example((Document(random.integers(0, 37, length + 1).astype(np.int32), counts),), 1))
    return Examples("none", found)


def loss_and_gradients(config: ModelConfig, rows: list[list[int]], kernels: Kernels) -> tuple[Any, dict[str, Any]]:
    model, packed = GPT(config, SINGLE, kernels=kernels), PackedRows(documents(), rows, config.seq_len, asks=False)
    batch = packed.micro_batch(range(len(rows)), range(len(rows)))
    tokens_BT, ids_B, positions_BT = batch.inputs
    loss = model(tokens_BT, ids_B, batch.targets, positions_BT=positions_BT)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


def cases() -> list[tuple[str, str, str]]:
    ways = ("reference", "softmax", "blocks", "sdpa", "flex")
    dense = [(way, position, "dense") for way in ways for position in POSITIONS]
    others = [(way, "learned", pattern) for way in ways for pattern in PATTERNS[1:]]
    return [case for case in [*dense, *others] if attention_lacks(case[0], case[1], 0.0) is None]


@pytest.mark.parametrize(("way", "position", "pattern"), cases())
def test_packed_is_trained_as_alone(way: str, position: str, pattern: str, monkeypatch: pytest.MonkeyPatch):
    """Loss and all gradients, fp32: in one row with others, and in a row of its own."""
    # torch refuses training with FlexAttention on the CPU, whose gradients its plain implementation has all the same.
    monkeypatch.setattr(torchs_flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(blocks, "QUERIES", 8)
    config = replace(BASE, position=position, attention=(pattern,), n_kv_heads=2 if position == "rotary" else None)
    kernels = Kernels.parse(f"auto,attention={way}")
    loss, gradients = loss_and_gradients(config, PACKED, kernels)
    alone, wanted = loss_and_gradients(config, ALONE, kernels)
    assert loss.item() == pytest.approx(alone.item(), rel=1e-6)
    for name, gradient in wanted.items():
        if gradient is not None:
            assert_close(gradients[name], gradient, name)


def test_without_borders_it_would_be_another_loss():
    rows = PackedRows(documents(), PACKED, BASE.seq_len, asks=False)
    batch = rows.micro_batch(range(4), range(4))
    model = GPT(BASE, SINGLE)
    apart = model(*batch.inputs[:2], batch.targets, positions_BT=batch.positions_BT)
    together = model(*batch.inputs[:2], batch.targets)
    assert abs(apart.item() - together.item()) > 1e-3


def test_each_label_counts_alike_however_rows_are_cut_into_micro_batches():
    rows = PackedRows(documents(), PACKED, BASE.seq_len, asks=False)
    model, whole = GPT(BASE, SINGLE), rows.micro_batch(range(4), range(4))
    parts = [rows.micro_batch(range(i, i + 1), range(4)) for i in range(4)]

    def loss(batch: Any) -> torch.Tensor:
        return model(*batch.inputs[:2], batch.targets, positions_BT=batch.positions_BT)

    mean = torch.stack([loss(part) for part in parts]).mean()
    assert mean.item() == pytest.approx(loss(whole).item(), rel=1e-6)
    logits_BTV = model(*whole.inputs[:2], positions_BT=whole.positions_BT)
    losses_BT = torch.nn.functional.cross_entropy(logits_BTV.transpose(1, 2), whole.labels_BT, reduction="none")
    assert whole.weights_BT is not None
    assert mean.item() == pytest.approx(losses_BT[whole.weights_BT > 0].mean().item(), rel=1e-6)
