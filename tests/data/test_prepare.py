"""The pipeline: the same bytes as Megatron-LM, whatever the number of workers."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from megagpt.data.indexed.dataset import IndexedDataset, verify
from megagpt.data.indexed.meta import losses, read_meta
from megagpt.data.text import prepare as prepare_module
from megagpt.data.text.documents import BLOCK_BYTES
from megagpt.data.text.prepare import Progress, TokenizerFiles, prepare
from megagpt.data.tokenizers.tokenizer import build_tokenizer
from megagpt.errors import UserError

BYTES = TokenizerFiles(kind="bytes")


@pytest.fixture
def source(tmp_path: Path, sample_text: str) -> Path:
    """2.5 MB, so three blocks; documents of all lengths, empty ones among them."""
    path = tmp_path / "in.jsonl"
    documents = [sample_text[i : i + (i * 37) % 3000] for i in range(0, len(sample_text), 7)]
    with open(path, "w") as file:
        for document in documents:
            file.write(json.dumps({"text": document, "title": document[:5]}) + "\n")
    assert path.stat().st_size > 2 * BLOCK_BYTES
    return path


def _bytes(prefix: Path, key: str = "text") -> list[bytes]:
    return [Path(f"{prefix}_{key}_document{suffix}").read_bytes() for suffix in (".bin", ".idx")]


@pytest.mark.parametrize("append_eod", [True, False])
def test_same_bytes_as_megatron(append_eod: bool, source: Path, tmp_path: Path, gpt2_files, reference_bpe) -> None:
    """Against the loop of Megatron-LM's preprocess_data.py over megatron-core's builder, ids by Hugging Face."""
    megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    files = TokenizerFiles(kind="gpt2", vocab_file=str(gpt2_files[0]), merge_file=str(gpt2_files[1]))
    prepare([str(source)], str(tmp_path / "ours"), files, append_eod=append_eod, workers=1)

    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "theirs_text_document.bin"), dtype=np.uint16)
    end = reference_bpe.token_to_id("<|endoftext|>")
    for line in source.read_text().splitlines():
        ids = reference_bpe.encode(json.loads(line)["text"]).ids
        ids += [end] if ids and append_eod else []
        builder.add_document(ids, [len(ids)] if ids else [])
    builder.finalize(str(tmp_path / "theirs_text_document.idx"))
    assert _bytes(tmp_path / "ours") == _bytes(tmp_path / "theirs")


def test_workers_do_not_change_a_byte(source: Path, tmp_path: Path) -> None:
    for workers in (1, 2, 3):
        prepare([str(source)], str(tmp_path / f"w{workers}"), BYTES, append_eod=True, workers=workers)
    assert _bytes(tmp_path / "w1") == _bytes(tmp_path / "w2") == _bytes(tmp_path / "w3")


def test_an_error_in_a_worker_is_the_first_in_the_input(source: Path, tmp_path: Path) -> None:
    lines = source.read_bytes().split(b"\n")
    n = len(lines)
    lines[n // 2] = lines[n - 3] = b"{"
    source.write_bytes(b"\n".join(lines))
    with pytest.raises(UserError, match=f"in.jsonl: line {n // 2 + 1}: "):
        prepare([str(source)], str(tmp_path / "out"), BYTES, workers=2)
    assert not list(tmp_path.glob("out*"))


def test_several_keys_make_several_datasets(source: Path, tmp_path: Path) -> None:
    metas = prepare([str(source)], str(tmp_path / "a"), BYTES, keys=["text", "title"], workers=1).metas
    prepare([str(source)], str(tmp_path / "b"), BYTES, workers=1)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
    titles = IndexedDataset(tmp_path / "a_title_document")
    assert titles.n_tokens == metas[1].tokens == metas[1].text_bytes
    assert int(titles.lengths.max()) == 5


def test_one_key_without_text_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"text": "a", "title": ""}\n')
    with pytest.raises(UserError, match="no text"):
        prepare([str(tmp_path / "in.jsonl")], str(tmp_path / "a"), BYTES, keys=["text", "title"])
    assert not list(tmp_path.glob("a*"))


def test_what_is_recorded(source: Path, tmp_path: Path, sentencepiece_file: Path) -> None:
    files = TokenizerFiles(kind="sentencepiece", model=str(sentencepiece_file))
    prefix = tmp_path / "a_text_document"
    (meta,) = prepare([str(source)], str(tmp_path / "a"), files, append_eod=True, workers=1).metas
    recorded = read_meta(prefix)
    dataset, tokenizer = IndexedDataset(prefix), build_tokenizer("sentencepiece", model=str(sentencepiece_file))
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    assert recorded is not None
    assert (recorded.tokenizer, recorded.tokenizer_files) == ("sentencepiece", (str(sentencepiece_file),))
    assert recorded.tokenizer_sha256 == tokenizer.sha256 == meta.tokenizer_sha256
    assert (recorded.vocab_size, recorded.eod, recorded.append_eod) == (600, tokenizer.eod, True)
    assert (recorded.documents, recorded.tokens) == (len(dataset), dataset.n_tokens)
    assert recorded.text_bytes == sum(len(text.encode()) for text in texts)
    tokens = np.concatenate([part for _, part in dataset.chunks()])
    assert int(tokenizer.token_bytes()[tokens].sum()) == recorded.text_bytes == recorded.token_text_bytes
    assert (recorded.unknown_tokens, recorded.lost_share, losses(recorded)) == (0, 0.0, [])
    assert recorded.bin_sha256 == hashlib.sha256(_bytes(tmp_path / "a")[0]).hexdigest()
    assert recorded.idx_sha256 == hashlib.sha256(_bytes(tmp_path / "a")[1]).hexdigest()
    verify(IndexedDataset(prefix))


def test_progress(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def report(progress: Progress) -> None:
        seen.append((progress.documents + progress.empty_documents, progress.stored_bytes))

    prepare([str(source)], str(tmp_path / "a"), BYTES, workers=1, report=report)
    assert len(seen) > 1 and seen == sorted(seen)
    assert seen[-1] == (source.read_text().count("\n"), source.stat().st_size)


def test_what_is_on_the_way_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches there are, at most the budget has been read ahead of the results taken."""
    monkeypatch.setattr(prepare_module, "ProcessPoolExecutor", _Immediate)
    block = prepare_module.Block(prepare_module.InputFile(Path("a"), True), 1, bytes(BLOCK_BYTES), 1)
    taken = read = ahead = 0

    def batches():
        nonlocal read
        for _ in range(100):
            read += 1
            yield [block]

    for _ in prepare_module._in_order(lambda batch: [], batches(), workers=2):
        taken += 1
        ahead = max(ahead, read - taken)
    assert taken == 100
    assert ahead == 8  # 4 a worker


class _Immediate:
    """An executor without processes."""

    def __init__(self, *args, **kwargs) -> None: ...

    def __enter__(self):
        return self

    def __exit__(self, *args) -> None: ...

    def submit(self, function, batch):
        future: Future = Future()
        future.set_result(function(batch))
        return future

    def shutdown(self, **kwargs) -> None: ...


def test_preprocess_command(source: Path, tmp_path: Path, run_tool) -> None:
    """Underscores and Megatron's names work; progress and summary tell documents, tokens, MB/s."""
    outcome = run_tool(
        "preprocess_data", "--input", source, "--output_prefix", tmp_path / "a", "--tokenizer_type",
        "ByteLevelTokenizer", "--json_keys", "text", "--append_eod", "--workers=1", "--log_interval", 1,
    )  # fmt: skip
    outcome.succeeded()
    assert "documents" in outcome.err and "tokens" in outcome.err and "MB/s" in outcome.err
    assert "a_text_document: " in outcome.out
    prepare([str(source)], str(tmp_path / "b"), BYTES, append_eod=True)
    assert _bytes(tmp_path / "a") == _bytes(tmp_path / "b")
