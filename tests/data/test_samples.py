"""GPTSamples against Megatron-core's GPTDataset: the three indices, and the tokens of the samples."""

import struct
from pathlib import Path

import numpy as np
import pytest

from megagpt.config.values import Split
from megagpt.data.indexed.coverage import times_read
from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.samples import GPTSamples, split_bounds
from megagpt.errors import UserError


class Tokenizer:
    """What Megatron's dataset asks of one; no token of the data is its pad or eod."""

    vocab_size, eod, pad, unique_identifiers = 60_000, 59_999, 59_998, "test"


def write(prefix, lengths, seed=0, dtype=np.uint16, tokens=None):
    """A dataset of sequences, empty ones too: our writer makes none, but those of others do."""
    if tokens is None:
        tokens = np.random.default_rng(seed).integers(0, 50_000, sum(lengths))
    lengths = np.array(lengths, "<i4")
    offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    code = {np.uint16: 8, np.int32: 4}[dtype]
    header = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(lengths) + 1)
    boundaries = np.arange(len(lengths) + 1, dtype="<i8")
    Path(f"{prefix}.bin").write_bytes(tokens.astype(dtype).tobytes())
    Path(f"{prefix}.idx").write_bytes(b"".join([header, lengths, offsets, boundaries]))
    return prefix


def megatron_samples(prefix, documents, num_samples, seq_len, seed, cache):
    gpt = pytest.importorskip("megatron.core.datasets.gpt_dataset", reason="megatron-core is not installed")
    from megatron.core.datasets.utils import Split

    config = gpt.GPTDatasetConfig(
        random_seed=seed,
        sequence_length=seq_len,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    low_level = gpt.GPTDataset.build_low_level_dataset(str(prefix), config)
    indices = np.arange(*documents, dtype=np.int32)
    return gpt.GPTDataset(low_level, str(prefix), indices, num_samples, Split.train, config)


def assert_same(ours, theirs):
    for name in ("document_index", "sample_index", "shuffle_index"):
        got, want = getattr(ours, name), getattr(theirs, name)
        assert got.dtype == want.dtype, name
        np.testing.assert_array_equal(got, want, err_msg=name)
    assert len(ours) == len(theirs)
    for i in sorted({*range(min(len(ours), 25)), len(ours) // 2, len(ours) - 1}):
        item = theirs[i]
        np.testing.assert_array_equal(ours[i][:-1], item["tokens"].numpy())
        np.testing.assert_array_equal(ours[i][1:], item["labels"].numpy())


def test_same_samples_as_megatron_over_many_shapes(tmp_path):
    """Random lengths (empty documents too), splits, sequence lengths, seeds, and 1 to 5 epochs."""
    random = np.random.default_rng(20)
    seen = {"one epoch": 0, "last apart": 0, "last together": 0}
    for case in range(40):
        n_documents = int(random.integers(3, 80))
        lengths = random.integers(0, int(random.choice([4, 60, 300])), n_documents)
        lengths[random.integers(0, n_documents)] += 200
        prefix = write(tmp_path / str(case), lengths, case, [np.uint16, np.int32][case % 2])
        dataset = IndexedDataset(prefix)
        split = str(random.choice(["969,30,1", "80,20", "1", "5,3,2", "0.3,0.3,0.4"]))
        documents = split_bounds(Split.parse(split), n_documents)[0]
        tokens = int(lengths[slice(*documents)].sum())
        seq_len = int(random.integers(1, 1 + min(64, max(1, tokens - 1))))
        if tokens <= seq_len:
            continue
        num_samples = int(random.uniform(0.2, 5) * tokens / seq_len)
        seed = int(random.integers(0, 2**32))
        ours = GPTSamples(dataset, documents=documents, num_samples=num_samples, seq_len=seq_len, seed=seed)
        theirs = megatron_samples(prefix, documents, num_samples, seq_len, seed, tmp_path / "cache")
        assert_same(ours, theirs)
        epochs = ours.epochs
        kind = "one epoch" if epochs.n_epochs == 1 else "last together"
        seen["last apart" if epochs.n_epochs_together < epochs.n_epochs else kind] += 1
    assert min(seen.values()) >= 4, seen


@pytest.mark.parametrize("num_samples", [9, 10, 11, 17, 18, 20, 21, 27, 28])
def test_same_samples_as_megatron_at_the_borders_of_an_epoch(tmp_path, num_samples):
    """10 samples an epoch: the last epoch goes apart while it gives fewer than 8."""
    prefix = write(tmp_path / "d", [0, 0, 31, 1, 0, 49, 20, 0])
    ours = GPTSamples(IndexedDataset(prefix), documents=(0, 8), num_samples=num_samples, seq_len=10, seed=1234)
    assert_same(ours, megatron_samples(prefix, (0, 8), num_samples, 10, 1234, tmp_path))


def test_no_samples_asked_gives_one_epoch_as_in_megatron(tmp_path):
    prefix = write(tmp_path / "d", [31, 70])
    ours = GPTSamples(IndexedDataset(prefix), documents=(0, 2), num_samples=0, seq_len=10, seed=5)
    assert_same(ours, megatron_samples(prefix, (0, 2), 0, 10, 5, tmp_path))


def test_documents_of_a_sample_are_its_tokens(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "d", [5, 0, 3, 40, 1, 0, 2]))
    samples = GPTSamples(dataset, documents=(0, 7), num_samples=20, seq_len=8, seed=3)
    for i in range(len(samples)):
        pieces = samples.documents_of(i)
        assert all(length > 0 for _, _, length in pieces)
        read = np.concatenate([dataset.get(d)[offset : offset + length] for d, offset, length in pieces])
        np.testing.assert_array_equal(read, samples[i])
        assert samples[i].dtype == np.int64 and len(samples[i]) == 9


def test_one_epoch_reads_every_token_once(tmp_path):
    lengths = [17, 0, 60, 4]
    prefix = write(tmp_path / "d", lengths, tokens=np.arange(81))
    samples = GPTSamples(IndexedDataset(prefix), documents=(0, 4), num_samples=8, seq_len=10, seed=1)
    inputs, labels = (np.concatenate([sample[part] for sample in samples]) for part in (slice(-1), slice(1, None)))
    assert len(set(inputs.tolist())) == len(inputs) == len(set(labels.tolist())) == 80
    assert {*inputs.tolist(), *labels.tolist()} == set(range(81))


@pytest.mark.parametrize("i", [-1, 10])
def test_a_sample_that_is_not_there(tmp_path, i):
    dataset = IndexedDataset(write(tmp_path / "d", [101]))
    samples = GPTSamples(dataset, documents=(0, 1), num_samples=10, seq_len=10, seed=1)
    with pytest.raises(IndexError, match="of 10"):
        samples[i]


@pytest.mark.parametrize(("documents", "held"), [((0, 2), 10), ((1, 1), 0), ((2, 3), 0)])
def test_too_little_for_one_sample(tmp_path, documents, held):
    dataset = IndexedDataset(write(tmp_path / "d", [4, 6, 0]))
    with pytest.raises(UserError, match=rf"{tmp_path}/d: .*hold {held} tokens.*seq_len \+ 1 = 11.*--split"):
        GPTSamples(dataset, documents=documents, num_samples=1, seq_len=10, seed=1)


def test_split_bounds_are_megatrons():
    config = pytest.importorskip("megatron.core.datasets.blended_megatron_dataset_config")
    random = np.random.default_rng(0)
    splits = ["969,30,1", "949,50,1", "1", "0,1", "0, 0, 1", "99,1,0", ".5,.25,.25", "8., 1, 1"]
    splits += [",".join(map(str, random.integers(1, 1000, 3))) for _ in range(200)]
    for split in splits:
        matrix = config.convert_split_vector_to_split_matrix(config.parse_and_normalize_split(split))
        for n in (0, 1, 2, 3, 7, 10, 50, 999, 1000, 2_000_000_001):
            for (start, stop), share in zip(split_bounds(Split.parse(split), n), matrix, strict=True):
                if share is None:
                    assert start == stop, (split, n)
                else:
                    assert [start, stop] == [round(s * float(n)) for s in share], (split, n)


def test_more_samples_than_memory_holds(tmp_path):
    dataset = IndexedDataset(write(tmp_path / "a", [40, 40]))
    with pytest.raises(UserError, match=r"a: the order of \d+ samples, .* does not fit in memory; lower --train-steps"):
        GPTSamples(dataset, documents=(0, 2), num_samples=2**60, seq_len=8, seed=0)


def test_how_often_tokens_are_read_is_what_reading_them_shows(tmp_path):
    """All of them are looked at where they are few: one order for a while, then another one."""
    write(tmp_path / "d", [7, 30, 0, 5, 21, 40])
    dataset = IndexedDataset(tmp_path / "d")
    orders = [GPTSamples(dataset, documents=(0, len(dataset)), num_samples=n, seq_len=6, seed=3) for n in (12, 30)]
    parts = [(orders[0], range(9)), (orders[1], range(9, 28))]
    counts = [np.zeros(length, int) for length in dataset.lengths]
    for samples, positions in parts:
        for i in positions:
            tokens = [(d, t) for d, first, length in samples.documents_of(i) for t in range(first, first + length)]
            for document, token in tokens[:-1]:  # the last one is only a label
                counts[document][token] += 1
    expected = np.bincount(np.concatenate(counts)) / dataset.n_tokens
    np.testing.assert_allclose(times_read(parts), expected)
