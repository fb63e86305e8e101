"""The indexed dataset against megatron-core's, round trips, and what a flipped bit does."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megagpt.data.indexed.dataset import IndexedDataset, IndexedWriter, verify
from megagpt.data.indexed.meta import DatasetMeta, read_meta
from megagpt.data.indexed.mmididx import HEADER, dtype_for
from megagpt.errors import UserError

META = DatasetMeta(
    tokenizer="bytes", tokenizer_files=(), tokenizer_sha256="0", vocab_size=257, eod=256, append_eod=False,
    documents=0, tokens=0, text_bytes=0,
)  # fmt: skip
DOCUMENTS = [[5, 6, 7], [], [], [8], list(range(300)), []]


def _write(prefix: Path, documents: list[list[int]], dtype: type, meta: DatasetMeta | None = None) -> None:
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(np.array(document, dtype))
        if meta is not None:
            writer.finish(meta)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_same_bytes_as_megatron(dtype: type, tmp_path: Path) -> None:
    """The calls are those of Megatron-LM's preprocess_data.py: an empty document has no sequence."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    _write(tmp_path / "ours", DOCUMENTS, dtype)
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype)
    for document in DOCUMENTS:
        builder.add_document(document, [len(document)] if document else [])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_reads_what_megatron_writes_and_the_reverse(tmp_path: Path) -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.int32)
    builder.add_document(list(range(10)), [4, 0, 6])  # several sequences a document, one of them empty
    builder.add_document(list(range(3)), [3])
    builder.finalize(str(tmp_path / "theirs.idx"))
    ours = IndexedDataset(tmp_path / "theirs")
    assert [ours.get(i).tolist() for i in range(4)] == [[0, 1, 2, 3], [], [4, 5, 6, 7, 8, 9], [0, 1, 2]]
    assert ours.document_indices.tolist() == [0, 3, 4]

    _write(tmp_path / "ours", DOCUMENTS, np.uint16)
    theirs = megatron.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == [d for d in DOCUMENTS if d]
    assert theirs.document_indices.tolist() == [0, 1, 1, 1, 2, 3, 3]


@settings(deadline=None, max_examples=50)
@given(
    documents=st.lists(st.lists(st.integers(0, 65535), max_size=20), max_size=20),
    dtype=st.sampled_from([np.uint16, np.int32, np.int64]),
    data=st.data(),
)
def test_round_trip(
    documents: list[list[int]], dtype: type, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    prefix = tmp_path_factory.mktemp("trip") / "a"
    _write(prefix, documents, dtype)
    dataset = IndexedDataset(prefix)
    full = [document for document in documents if document]
    assert dataset.dtype == dtype and len(dataset) == len(full)
    assert dataset.n_tokens == sum(map(len, full))
    bounds = dataset.document_indices.tolist()
    assert [[t for i in range(a, b) for t in full[i]] for a, b in pairwise(bounds)] == documents
    assert [token for _, part in dataset.chunks() for token in part.tolist()] == [t for d in full for t in d]
    for i, document in enumerate(full):
        start = data.draw(st.integers(0, len(document)))
        stop = data.draw(st.integers(start, len(document)))
        assert dataset.get(i, start, stop - start).tolist() == document[start:stop]
        assert dataset.get(i, start).tolist() == document[start:]
    verify(IndexedDataset(prefix))


def test_chunked_tail_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same file whatever the size of the chunks in which it is completed."""
    documents = [[1] * (i % 4) for i in range(50)]
    _write(tmp_path / "whole", documents, np.uint16)
    monkeypatch.setattr("megagpt.data.indexed.mmididx.CHUNK", 7)
    _write(tmp_path / "chunks", documents, np.uint16)
    assert (tmp_path / "whole.idx").read_bytes() == (tmp_path / "chunks.idx").read_bytes()


def test_get_refuses_what_is_outside(tmp_path: Path) -> None:
    _write(tmp_path / "a", [[1, 2, 3], [4]], np.uint16)
    dataset = IndexedDataset(tmp_path / "a")
    for arguments in [(0, 1, 3), (0, -1), (0, 4), (0, 0, -1), (2,)]:
        with pytest.raises(IndexError):
            dataset.get(*arguments)


def test_nothing_is_visible_before_the_end_nor_after_a_failure(tmp_path: Path) -> None:
    _write(tmp_path / "a", [[1]], np.uint16)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "a", np.int32, overwrite=True) as writer:
        writer.add_document(np.arange(1000))
        writer.finish(META)
        assert not (tmp_path / "a.json").exists()
        raise KeyError
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "a", np.uint16) as first:
        first.add_document(np.arange(3))
        with pytest.raises(UserError, match="locked"):
            IndexedWriter(tmp_path / "a", np.uint16)
    assert IndexedDataset(tmp_path / "a").n_tokens == 3


def test_overwriting_without_a_side_file_removes_the_old_one(tmp_path: Path) -> None:
    _write(tmp_path / "a", [[1]], np.uint16, META)
    assert read_meta(tmp_path / "a") is not None
    with IndexedWriter(tmp_path / "a", np.uint16, overwrite=True) as writer:
        writer.add_document(np.array([2, 3]))
    assert read_meta(tmp_path / "a") is None
    assert IndexedDataset(tmp_path / "a").get(0).tolist() == [2, 3]


def test_dtype_is_megatrons_choice() -> None:
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    for vocab_size in (257, 50257, 65499, 65500, 65536, 70000):
        assert dtype_for(vocab_size) == megatron.DType.optimal_dtype(vocab_size)


def test_every_flipped_bit_of_an_index(tmp_path: Path) -> None:
    """With the side file each flip is refused. Without it: lengths that stay consistent cannot be told."""
    documents = [list(range(n)) for n in (6, 3, 5, 0, 9)]
    _write(tmp_path / "a", documents, np.uint16, META)
    idx, side = tmp_path / "a.idx", tmp_path / "a.json"
    good = idx.read_bytes()

    def silent_flips() -> list[int]:
        silent = []
        for bit in range(8 * len(good)):
            data = bytearray(good)
            data[bit // 8] ^= 1 << (bit % 8)
            idx.write_bytes(data)
            try:
                IndexedDataset(tmp_path / "a")
                silent.append(bit)
            except UserError:
                pass
        return silent

    assert silent_flips() == []
    side.unlink()
    # Every length is tied to an offset, the last offset to the size of .bin, and no flip leads from uint16 to
    # another type of 2 bytes. Only an inner document boundary may move between its neighbours unseen, and
    # that changes no token: 3 of 1,040 flips, the lowest bits of boundaries 1, 2 and 3 of [0, 1, 2, 3, 3, 4].
    first = HEADER.size + 12 * 4
    assert silent_flips() == [8 * (first + 8 * boundary) for boundary in (1, 2, 3)]


def test_every_flipped_bit_and_cut_of_a_side_file(tmp_path: Path) -> None:
    """Its own hash tells what no type does: another count, another vocabulary, a hash of other files."""
    _write(tmp_path / "a", [[1, 2], [3]], np.uint16, META)
    side = tmp_path / "a.json"
    good = side.read_bytes()
    assert read_meta(tmp_path / "a") is not None
    for bit in range(8 * len(good)):
        data = bytearray(good)
        data[bit // 8] ^= 1 << (bit % 8)
        side.write_bytes(data)
        with pytest.raises(UserError, match=r"a\.json: "):
            read_meta(tmp_path / "a")
    for length in range(len(good) - 1):  # all but the final newline
        side.write_bytes(good[:length])
        with pytest.raises(UserError, match=r"a\.json: "):
            read_meta(tmp_path / "a")
