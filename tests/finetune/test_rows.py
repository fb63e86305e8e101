"""Rows of examples: each pass has all of them once, row i does not depend on how many are taken, weights are shares."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megagpt.finetune.glue import Glue
from megagpt.finetune.packing import epoch_rows, first_rows, packed, rows_of_epochs
from megagpt.finetune.rows import PackedRows
from tests.finetune.examples import READING, write_glue

LENGTHS = np.random.default_rng(0).integers(1, 30, 100)


@pytest.mark.parametrize("pack", [True, False])
def test_a_pass_has_each_example_once_and_rows_have_room(pack):
    for number in (0, 1):
        rows = list(epoch_rows(LENGTHS, 32, seed=5, pack=pack, number=number))
        assert sorted(example for row in rows for example in row) == list(range(100))
        assert all(sum(LENGTHS[row]) <= 32 and (pack or len(row) == 1) for row in rows)
    assert next(epoch_rows(LENGTHS, 32, 5, pack, 0)) != next(epoch_rows(LENGTHS, 32, 5, pack, 1))


def test_a_row_is_the_same_however_many_are_taken():
    assert first_rows(LENGTHS, 32, 5, True, 20) == first_rows(LENGTHS, 32, 5, True, 200)[:20]
    n = rows_of_epochs(LENGTHS, 32, 5, True, 2)
    assert first_rows(LENGTHS, 32, 5, True, n + 1)[n] == next(epoch_rows(LENGTHS, 32, 5, True, 2))


def test_a_micro_batch_of_a_classifier(tmp_path):
    read = Glue("MRPC").read(write_glue(tmp_path / "a.tsv", "MRPC", 3), READING)
    lengths = np.array([example.n_tokens for example in read.found])
    rows = PackedRows(read, [*packed(lengths, range(3), 48), []], seq_len=48, asks=True)
    batch = rows.micro_batch(range(len(rows)), range(len(rows)))
    assert batch.answers is not None and batch.positions_BT is not None and batch.weights_BT is not None
    B, T = batch.tokens_BT.shape
    assert batch.answers.weights_BT.sum().item() == pytest.approx(B * T)
    assert batch.weights_BT.sum().item() == pytest.approx(B * T)
    for number, example in enumerate(read.found):
        ((b, t),) = (batch.answers.examples_BT == number).nonzero().tolist()
        mate = int(batch.answers.mates_BT[b, t])
        assert batch.tokens_BT[b, t] == batch.tokens_BT[b, mate] == 259  # extract
        assert t - mate == len(example.documents[1].counts) and batch.answers.values_BT[b, t] == example.answer
    assert batch.positions_BT[-1].tolist() == list(range(T)) and not batch.weights_BT[-1].any()  # the empty row
    assert int((batch.answers.examples_BT >= 0).sum()) == 3
    assert torch.equal(batch.sample_ids_B, torch.arange(B))
