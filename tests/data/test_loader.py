"""Micro-batches: a pure function of the step, and the same samples for every layout."""

import numpy as np
import pytest
import torch

from megagpt.config import ModelConfig, RunConfig, TrainConfig
from megagpt.config.values import Split
from megagpt.data.indexed.blend import build_splits
from megagpt.data.indexed.dataset import IndexedDataset, IndexedWriter
from megagpt.data.loader import micro_batches
from megagpt.errors import UserError

GLOBAL = 24


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    prefix = tmp_path_factory.mktemp("loader") / "d"
    random = np.random.default_rng(0)
    with IndexedWriter(prefix, np.int32) as writer:
        for length in random.integers(1, 90, 60):
            writer.add_document(random.integers(0, 100_000, length))
    return build_splits([IndexedDataset(prefix)], (), Split.parse("1"), 16, 1234, (4 * GLOBAL, 0, 0))[0]


def run(micro, vocab_size=100_000):
    return RunConfig(
        model=ModelConfig(vocab_size=vocab_size), train=TrainConfig(global_batch_size=GLOBAL, micro_batch_size=micro)
    )


def read(samples, step, micro, dp_rank=0, dp_size=1, seq_len=16, **config):
    positions = range(step * GLOBAL, (step + 1) * GLOBAL)
    return micro_batches(samples, run(micro, **config), positions, seq_len, dp_rank=dp_rank, dp_size=dp_size)


def ids(samples, step, micro, dp):
    """[dp_rank][micro-batch] -> sample ids."""
    return [
        [batch.sample_ids_B.tolist() for batch in read(samples, step, micro, dp_rank=rank, dp_size=dp)]
        for rank in range(dp)
    ]


def test_each_rank_takes_its_slice_of_each_chunk(samples):
    assert ids(samples, 1, micro=4, dp=2) == [
        [[24, 25, 26, 27], [32, 33, 34, 35], [40, 41, 42, 43]],
        [[28, 29, 30, 31], [36, 37, 38, 39], [44, 45, 46, 47]],
    ]


@pytest.mark.parametrize(("micro", "dp"), [(1, 1), (24, 1), (1, 8), (2, 2), (2, 3), (2, 4), (3, 4), (3, 8)])
def test_a_step_reads_the_same_samples_in_every_layout(samples, micro, dp):
    for step in range(4):
        read = [i for rank in ids(samples, step, micro, dp) for batch in rank for i in batch]
        assert sorted(read) == list(range(step * GLOBAL, (step + 1) * GLOBAL))


def test_contents_are_the_samples_and_do_not_depend_on_what_was_read_before(samples):
    def once(step):
        return list(read(samples, step, 3, dp_rank=1, dp_size=2))

    first = once(2)
    once(0)
    for batch, again in zip(first, once(2), strict=True):
        assert batch.tokens_BT.dtype == batch.labels_BT.dtype == batch.sample_ids_B.dtype == torch.int64
        assert batch.tokens_BT.shape == batch.labels_BT.shape == (3, 16)
        assert batch.tokens_BT.is_contiguous() and batch.labels_BT.is_contiguous()
        torch.testing.assert_close(batch.tokens_BT, again.tokens_BT, rtol=0, atol=0)
        for row, i in enumerate(batch.sample_ids_B.tolist()):
            assert batch.tokens_BT[row].tolist() == samples[i][:-1].tolist()
            assert batch.labels_BT[row].tolist() == samples[i][1:].tolist()


@pytest.mark.parametrize("step", [-1, 1000])
def test_a_step_beyond_the_samples_is_told_at_the_call(samples, step):
    with pytest.raises(UserError, match=f"a step reads samples {step * GLOBAL} to "):
        read(samples, step, 1)


def test_a_shorter_sequence_is_the_beginning_of_the_sample(samples):
    for batch in read(samples, 1, 3, seq_len=5):
        assert batch.tokens_BT.shape == batch.labels_BT.shape == (3, 5)
        for row, i in enumerate(batch.sample_ids_B.tolist()):
            assert batch.tokens_BT[row].tolist() == samples[i][:5].tolist()
            assert batch.labels_BT[row].tolist() == samples[i][1:6].tolist()


def test_a_token_beyond_the_vocabulary_is_told_with_its_samples(samples):
    largest = max(int(samples[i].max()) for i in range(GLOBAL))
    assert len(list(read(samples, 0, 4, vocab_size=largest + 1))) == GLOBAL // 4
    with pytest.raises(UserError, match=f"hold token {largest}, the vocabulary has {largest}; .*another tokenizer"):
        list(read(samples, 0, 4, vocab_size=largest))
