"""Blends against Megatron-core's own builder of blended datasets, and the arguments that describe them."""

import numpy as np
import pytest

from megagpt.config.values import DataPath, Split
from megagpt.data.indexed.blend import Blend, build_splits
from megagpt.data.indexed.dataset import IndexedDataset, IndexedWriter
from megagpt.data.indexed.samples import GPTSamples
from megagpt.errors import UserError


class Tokenizer:
    """What Megatron's dataset asks of one; no token of the data is its pad or eod."""

    vocab_size, eod, pad, unique_identifiers = 60_000, 59_999, 59_998, "test"


def write(prefix, n_documents, seed, mean=40):
    random = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in random.integers(0, 2 * mean, n_documents):
            writer.add_document(random.integers(0, 50_000, length))
    return str(prefix)


def splits(data_path, split, *args):
    path = DataPath.parse(data_path)
    return build_splits([IndexedDataset(p) for p in path.prefixes], path.weights, Split.parse(split), *args)


def megatron_splits(data_path, split, seq_len, seed, num_samples, cache):
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is not installed")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.utils import get_blend_from_list

    config = gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len,
        blend=get_blend_from_list(list(data_path)),
        split=split,
        path_to_cache=None if len(data_path) > 1 else str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    return BlendedMegatronDatasetBuilder(gpt.GPTDataset, list(num_samples), lambda: True, config).build()


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    return [write(folder / name, n, seed) for seed, (name, n) in enumerate([("A", 90), ("B", 40), ("C", 150)])]


@pytest.mark.parametrize("num_samples", [(60, 20, 7), (383, 60, 19)])
@pytest.mark.parametrize("n_datasets", [2, 3])
def test_datasets_without_weights_are_blended_by_size_as_in_megatron(corpora, tmp_path, n_datasets, num_samples):
    args = (corpora[:n_datasets], "80,15,5", 11, 4321, num_samples)
    for got, want, asked in zip(splits(*args), megatron_splits(*args, tmp_path), num_samples, strict=True):
        assert len(got) == len(want) == asked  # all are less than an epoch
        for name in ("dataset_index", "dataset_sample_index"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
        for i in range(len(got)):
            np.testing.assert_array_equal(got[i][:-1], want[i]["tokens"].numpy())


def test_datasets_without_weights_go_on_beyond_an_epoch(corpora):
    """Where Megatron ends: with the same proportions."""
    train, _, _ = splits(corpora, "1", 11, 0, (4000, 0, 0))
    n_tokens = [IndexedDataset(prefix).n_tokens for prefix in corpora]
    assert len(train) >= 4000
    np.testing.assert_allclose(
        np.bincount(train.dataset_index) / len(train), np.divide(n_tokens, sum(n_tokens)), atol=0.002
    )


def test_a_dataset_shorter_than_a_sample_repeats_as_in_megatron(corpora, tmp_path):
    """Two documents of 12 tokens in all, for samples of 24."""
    with IndexedWriter(tmp_path / "short", np.uint16) as writer:
        for length in (5, 7):
            writer.add_document(np.arange(length))
    data_path = ["0.2", str(tmp_path / "short"), "0.8", corpora[0]]
    args = (data_path, "1", 23, 1, (50, 0, 0))
    got, want = splits(*args)[0], megatron_splits(*args, tmp_path)[0]
    for i in range(50):
        np.testing.assert_array_equal(got[i][:-1], want[i]["tokens"].numpy())
    with pytest.raises(UserError, match="short: documents"):
        splits(data_path[1:2], "1", 23, 1, (50, 0, 0))
    left, _, _ = splits(data_path[1::2], "1", 23, 1, (50, 0, 0))  # by size it has none
    assert [str(part.dataset.prefix) for part in left.datasets] == corpora[:1]


def test_what_megatron_takes_for_a_blend():
    for words, prefixes, weights in (
        ("A B C", "A B C", ""),
        ("A A B", "A B", ""),
        ("0 A 1 B", "B", "1"),
        ("0.3 A 0.2 B 0.30 A", "A B", "0.60 0.2"),
    ):
        path = DataPath.parse(words)
        assert " ".join(path.prefixes) == prefixes and " ".join(map(str, path.weights)) == weights
        assert DataPath.parse(path.words) == path
    for words, wrong in (("0 A 0 B", "above 0"), ("0.7 A B", "pairs"), ("A 0.3", 'weight "A"'), ("-1 A 2 B", '"-1"')):
        with pytest.raises(UserError, match=wrong):
            DataPath.parse(words)


@pytest.mark.parametrize("weights", [None, "1", "0.7 0.3", "3 1 2", "0.01 0.98 0.01", "0.3 0.2 0.2"])
@pytest.mark.parametrize("num_samples", [(60, 20, 7), (700, 3, 150), (1234, 100, 1)])
def test_same_splits_as_megatron(corpora, tmp_path, weights, num_samples):
    weights = weights.split() if weights else []
    data_path = [word for pair in zip(weights, corpora, strict=False) for word in pair] or corpora[:1]
    seq_len, seed = 11, 4321
    ours = splits(data_path, "80,15,5", seq_len, seed, num_samples)
    theirs = megatron_splits(data_path, "80,15,5", seq_len, seed, num_samples, tmp_path)
    for got, want, asked in zip(ours, theirs, num_samples, strict=True):
        assert asked <= len(got) == len(want)
        if weights:
            assert isinstance(got, Blend)
            for name in ("dataset_index", "dataset_sample_index"):
                assert getattr(got, name).dtype == getattr(want, name).dtype
                np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
        else:
            assert isinstance(got, GPTSamples)
        for i in {*range(min(len(got), 200)), len(got) - 1}:
            np.testing.assert_array_equal(got[i][:-1], want[i]["tokens"].numpy())
            np.testing.assert_array_equal(got[i][1:], want[i]["labels"].numpy())


def test_many_rare_datasets_get_the_samples_that_the_rule_draws(tmp_path):
    """Rounded up to 1 sample each, 12 rare datasets lengthen the blend; the common one must have enough."""
    prefixes = [write(tmp_path / str(i), 3, i, mean=20) for i in range(13)]
    weights = ["0.9"] + ["0.008"] * 12
    data_path = [word for pair in zip(weights, prefixes, strict=True) for word in pair]
    train, valid, test = splits(data_path, "1", 7, 0, (10, 10, 10))
    assert valid is test is None and len(train) >= 10
    assert all(len(train[i]) == 8 for i in range(len(train)))


@pytest.mark.parametrize("n_datasets", [1, 2])
def test_sources_of_name_where_the_tokens_lie(corpora, n_datasets):
    data_path = corpora[:1] if n_datasets == 1 else ["0.5", corpora[0], "0.5", corpora[1]]
    train, _, _ = splits(data_path, "1", 30, 0, (40, 0, 0))
    datasets = {prefix: IndexedDataset(prefix) for prefix in corpora}
    for i in range(len(train)):
        pieces = [datasets[prefix].get(*piece) for prefix, *piece in train.sources_of(i)]
        np.testing.assert_array_equal(np.concatenate(pieces), train[i])
    assert {prefix for i in range(len(train)) for prefix, *_ in train.sources_of(i)} == set(corpora[:n_datasets])
    for i in (-1, len(train)):
        with pytest.raises(IndexError):
            train[i]


def test_a_split_is_none_when_it_is_empty_or_not_asked_for(corpora):
    for path in (corpora[:1], ["2", corpora[0], "1", corpora[1]]):
        train, valid, test = splits(path, "99,0,1", 5, 0, (10, 10, 0))
        assert len(train) >= 10 and valid is None and test is None


def test_a_split_that_is_empty_in_one_dataset_only_is_an_error(corpora, tmp_path):
    small = write(tmp_path / "small", 3, 0)
    with pytest.raises(UserError, match=r"small: documents \[3, 3\) hold 0 tokens.*--split"):
        splits(["0.5", corpora[0], "0.5", small], "969,30,1", 5, 0, (10, 10, 0))
