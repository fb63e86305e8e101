"""The maps of the samples: C++ = NumPy = Megatron-core's compiled helpers, and what they must satisfy."""

import importlib.util
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.indexed import index_builder as maps

cpp = pytest.importorskip("megagpt._index_builder", reason="the C++ extension is not built: run `make build`")
LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


def documents(lengths, n_epochs, seed):
    index = np.tile(np.arange(len(lengths), dtype=np.int32), n_epochs)
    np.random.default_rng(seed).shuffle(index)
    return np.array(lengths, np.int32), index


@settings(max_examples=300, deadline=None)
@given(LENGTHS, st.integers(1, 3), st.integers(1, 50), st.integers(0, 1000))
def test_sample_index_is_the_same_from_cpp_numpy_and_megatron(lengths, n_epochs, seq_len, seed):
    megatron = pytest.importorskip("megatron.core.datasets.helpers")
    lengths, index = documents(lengths, n_epochs, seed)
    tokens_per_epoch = int(lengths.sum())
    n_samples = (n_epochs * tokens_per_epoch - 1) // seq_len
    if n_samples < 1:
        return
    want = megatron.build_sample_idx(lengths, index, seq_len, n_epochs, tokens_per_epoch, True, True)
    for built, dtype in [(cpp.sample_index_int32, np.int32), (cpp.sample_index_int64, np.int64)]:
        fast = built(lengths, index, seq_len, n_samples)
        slow = maps.sample_index_numpy(lengths, index, seq_len, n_samples, dtype)
        assert fast.dtype == slow.dtype == dtype
        np.testing.assert_array_equal(fast, want)
        np.testing.assert_array_equal(slow, want)
    chosen = maps.build_sample_index(lengths, index, seq_len, n_samples)
    assert chosen.dtype == want.dtype


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12), st.integers(0, 400))
def test_blending_indices_are_the_same_from_cpp_numpy_and_megatron(weights, size):
    megatron = pytest.importorskip("megatron.core.datasets.helpers")
    shares = np.array(weights) / np.sum(weights)
    dataset, sample = np.zeros(size, np.int16), np.zeros(size, np.int64)
    megatron.build_blending_indices(dataset, sample, shares.tolist(), len(shares), size, False)
    for got in (cpp.blending_indices(shares, size), maps.blending_indices_numpy(shares, size)):
        assert [a.dtype for a in got] == [np.int16, np.int64]
        np.testing.assert_array_equal(got[0], dataset)
        np.testing.assert_array_equal(got[1], sample)


def test_a_longer_blend_begins_with_the_shorter_one_and_keeps_its_shares():
    shares = np.array([0.7, 0.2, 0.1])
    short, long = maps.build_blending_indices(shares, 100), maps.build_blending_indices(shares, 1000)
    np.testing.assert_array_equal(long[0][:100], short[0])
    np.testing.assert_array_equal(long[1][:100], short[1])
    assert np.bincount(long[0]).tolist() == [700, 200, 100]


@pytest.mark.parametrize("build", ["cpp", "numpy"])
def test_too_few_tokens_or_a_wrong_document_is_an_error(build):
    def run(lengths, index, seq_len, n_samples):
        arrays = np.array(lengths, np.int32), np.array(index, np.int32)
        if build == "cpp":
            return cpp.sample_index_int32(*arrays, seq_len, n_samples)
        return maps.sample_index_numpy(*arrays, seq_len, n_samples, np.int32)

    assert run([3, 4], [1, 0], 3, 2).tolist() == [[0, 0], [0, 3], [1, 2]]
    for lengths, index in [([3, 3], [0, 1]), ([0, 0], [0, 1]), ([], [])]:
        with pytest.raises(ValueError, match="fewer tokens"):
            run(lengths, index, 3, 2)
    with pytest.raises(IndexError):
        run([3, 4], [0, 2], 3, 2)


def test_cpp_takes_no_array_of_another_type():
    lengths, index = np.array([9], np.int64), np.array([0], np.int32)
    with pytest.raises(TypeError):
        cpp.sample_index_int32(lengths, index, 2, 2)


def test_lengths_may_be_unaligned():
    lengths = np.ndarray((1,), np.int32, bytearray(64), offset=33)
    lengths[:] = 9
    assert not lengths.flags.aligned
    assert maps.build_sample_index(lengths, np.array([0], np.int32), 4, 2).tolist() == [
        [0, 0],
        [0, 4],
        [0, 8],
    ]


def test_dtypes_widen_where_megatrons_do():
    assert maps.sample_index_dtype(2**31 - 1) is np.int32
    assert maps.sample_index_dtype(2**31) is np.int64
    assert maps.shuffle_index_dtype(2**32 - 3) is np.uint32
    assert maps.shuffle_index_dtype(2**32 - 2) is np.int64


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64])
def test_shuffles_as_numpy_and_leaves_the_generator_as_numpy_does(dtype):
    for n, seed in ((0, 1), (1, 1), (2, 3), (1000, 1234), (70_000, 7)):
        ours, theirs = np.random.RandomState(seed), np.random.RandomState(seed)
        index, wanted = np.arange(n, dtype=dtype), np.arange(n, dtype=dtype)
        for part in (slice(0, n // 3), slice(n // 3, None)):  # not at the first word, the second time
            maps._shuffle(index[part], ours)
            theirs.shuffle(wanted[part])
            np.testing.assert_array_equal(index, wanted)
        assert ours.randint(2**31) == theirs.randint(2**31)


def test_other_threads_run_while_it_shuffles():
    """Python's own: with the GIL held they would stand still until it is done."""
    turns, done = [], threading.Event()
    index = np.arange(20_000_000, dtype=np.uint32)

    def count() -> None:
        while not done.is_set():
            turns.append(len(turns))
            done.wait(0.001)

    thread = threading.Thread(target=count)
    thread.start()
    while not turns:
        time.sleep(0.001)
    before = len(turns)
    maps._shuffle(index, np.random.RandomState(1))
    during = len(turns) - before
    done.set()
    thread.join()
    assert during > 3


@pytest.mark.parametrize(
    ("tokens", "num_samples", "seq_len", "want"),
    [
        (101, 10, 10, maps.Epochs(1, 10, 1, 10)),  # exactly one epoch
        (101, 11, 10, maps.Epochs(2, 20, 1, 10)),  # 1 of 10 from the last: apart
        (101, 17, 10, maps.Epochs(2, 20, 1, 10)),  # 7 < int(0.8 * 10): apart
        (101, 18, 10, maps.Epochs(2, 20, 2, 20)),  # 8: together
        (5, 3, 10, maps.Epochs(7, 3, 7, 3)),  # a split shorter than a sample
        (101, 0, 10, maps.Epochs(1, 10, 1, 10)),
    ],
)
def test_plan_epochs(tokens, num_samples, seq_len, want):
    assert maps.plan_epochs(tokens, num_samples, seq_len) == want


def test_without_the_extension_numpy_runs_and_the_reason_is_told(monkeypatch):
    assert maps.fallback_note() is None
    monkeypatch.setitem(sys.modules, "megagpt._index_builder", None)  # makes the import fail
    monkeypatch.delattr("megagpt._index_builder")
    spec = importlib.util.spec_from_file_location("index_builder_without_extension", maps.__file__)
    fallback = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, fallback)
    spec.loader.exec_module(fallback)

    told = fallback.fallback_note()
    assert told.startswith("note: NumPy") and "_index_builder" in told and "make build" in told
    lengths, index = documents([5, 0, 9, 2], 2, 0)
    got = fallback.build_sample_index(lengths, index, 3, 10)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, cpp.sample_index_int32(lengths, index, 3, 10))
    shares = np.array([0.5, 0.5])
    np.testing.assert_array_equal(fallback.build_blending_indices(shares, 9)[0], [0, 1] * 4 + [0])
