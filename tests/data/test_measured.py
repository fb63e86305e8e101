"""What a tokenizer loses of a text is measured, told, and not to its profit in bits per byte."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceTrainer

from megagpt.data.indexed.dataset import IndexedDataset
from megagpt.data.indexed.meta import losses, read_meta
from megagpt.data.indexed.text_bytes import text_bytes
from megagpt.data.text.prepare import TokenizerFiles, prepare
from megagpt.data.tokenizers.tokenizer import build_tokenizer


@pytest.fixture
def lossy(tmp_path: Path, sample_text: str) -> str:
    """A SentencePiece model with its usual settings: lines, runs of blanks and unknown characters are lost."""
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sample_text.splitlines()), model_writer=model, vocab_size=300, minloglevel=2
    )
    (tmp_path / "lossy.model").write_bytes(model.getvalue())
    return str(tmp_path / "lossy.model")


def test_what_is_lost_is_recorded_and_told(lossy: str, tmp_path: Path, sample_text: str, run_tool):
    text = sample_text[:3000] + "中" * 100
    (tmp_path / "in.jsonl").write_text(json.dumps({"text": text}) + "\n")
    outcome = run_tool(
        "preprocess_data", "--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "a",
        "--tokenizer", "sentencepiece", "--tokenizer-model", lossy,
    )  # fmt: skip
    outcome.succeeded()
    meta = read_meta(tmp_path / "a_text_document")
    assert meta is not None and meta.lost_share is not None and meta.unknown_tokens and meta.lost_characters
    assert meta.lost_share > (300 + text.count("\n")) / len(text.encode())  # three bytes each, and each line's end
    assert set("\n中") <= set(meta.lost_characters)
    unknown, lost = losses(meta)
    assert f"{meta.unknown_tokens / meta.tokens:.1%} of the tokens stand for text that the tokenizer does" in unknown
    assert unknown in outcome.err and lost in outcome.err
    assert "not kept of it" in run_tool("inspect_data", tmp_path / "a_text_document").out


def test_bytes_are_those_of_the_text(lossy: str, tmp_path: Path, sample_text: str):
    text = sample_text[:3000] + "中" * 100
    (tmp_path / "in.txt").write_text(text)
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "a"), TokenizerFiles(kind="sentencepiece", model=lossy))
    dataset, tokenizer = IndexedDataset(tmp_path / "a_text_document"), build_tokenizer("sentencepiece", model=lossy)
    tokens, sizes = dataset.get(0), tokenizer.token_bytes()
    assert int(sizes[tokens].sum()) < 0.95 * len(text.encode())
    assert text_bytes(tokens, dataset.meta, tokenizer, sizes) == pytest.approx(len(text.encode()))
    half = len(tokens) // 2
    parts = [text_bytes(part, dataset.meta, tokenizer, sizes) for part in (tokens[:half], tokens[half:])]
    assert sum(part or 0 for part in parts) == pytest.approx(len(text.encode()))
    assert dataset.meta is not None
    older = replace(dataset.meta, token_text_bytes=None)
    assert text_bytes(tokens, older, tokenizer, sizes) is None  # unknown tokens: nobody knows how many bytes
    known = tokens[tokens != tokenizer.unknown]
    assert text_bytes(known, older, tokenizer, sizes) == text_bytes(known, None, tokenizer, sizes) == sizes[known].sum()


def test_side_files_from_before_are_read(tmp_path: Path):
    """They lack what is measured now; their own hash is that of the values that they have."""
    (tmp_path / "in.txt").write_text("hello")
    prepare([str(tmp_path / "in.txt")], str(tmp_path / "a"), TokenizerFiles(kind="bytes"))
    path = tmp_path / "a_text_document.json"
    values = json.loads(path.read_text())
    for name in ("token_text_bytes", "unknown_tokens", "lost_share", "lost_characters", "json_sha256"):
        del values[name]
    own = hashlib.sha256(json.dumps(values).encode()).hexdigest()  # as it was written then
    path.write_text(json.dumps(values | {"json_sha256": own}))
    meta = read_meta(tmp_path / "a_text_document")
    assert meta is not None and meta.tokens == 5 and meta.lost_share is None and losses(meta) == []
    assert text_bytes(np.array([104, 256]), meta, build_tokenizer("bytes"), build_tokenizer("bytes").token_bytes()) == 1
