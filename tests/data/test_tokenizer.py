"""Tokenizers against Hugging Face's, exact round trips, bytes of tokens, the check of the recorded hash."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer as HfLibrary
from tokenizers import pre_tokenizers

from megagpt.config import DataConfig
from megagpt.data.tokenizers import gpt2 as tokenizer_gpt2
from megagpt.data.tokenizers.files import byte_alphabet
from megagpt.data.tokenizers.tokenizer import Tokenizer, build_tokenizer, tokenizer_for
from megagpt.errors import UserError

NASTY = [
    "", " ", "   ", "\n\n\n", "\t\t x", " " * 1000 + "x", "a" * 5000, "\r\n", "\x00\x01\x7f", "a_b--c…",
    "don't I'LL 'S \u017f's", "naïve café e\u0301 Å", "日本語のテキスト", "한국어", "العربية ١٢٣", "½Ⅷ٣",
    "\u00a0\u2003\u3000\u200b\ufeff", "\u2028\u2029\x85\x1c", "😀👩\u200d👩\u200d👧🏽", "\U0010ffff\ue000\ufffe",
    "x<|endoftext|>y <|endoftext|>", "<|endoftext", "</s><s><unk>", "\u2581", "1234567890 12 3", "ᄀ" * 50,
]  # fmt: skip
ALPHABET = st.text(
    alphabet=st.one_of(
        st.sampled_from(" \n\t'\u00a0\u3000aZ09_-<|>é日😀\u0301\u200d\x00"), st.characters(codec="utf-8")
    ),
    max_size=60,
)


@pytest.fixture(scope="session")
def gpt2(gpt2_files: tuple[Path, Path]) -> Tokenizer:
    return build_tokenizer("gpt2", vocab_file=str(gpt2_files[0]), merge_file=str(gpt2_files[1]))


@pytest.fixture(scope="session")
def all_kinds(gpt2: Tokenizer, hf_file: Path, sentencepiece_file: Path) -> list[Tokenizer]:
    return [
        gpt2,
        build_tokenizer("hf", model=str(hf_file)),
        build_tokenizer("sentencepiece", model=str(sentencepiece_file)),
        build_tokenizer("bytes"),
    ]


def test_gpt2_on_nasty_texts(gpt2: Tokenizer, reference_bpe: HfLibrary, sample_text: str) -> None:
    for text in [*NASTY, sample_text]:
        assert gpt2.encode(text) == reference_bpe.encode(text, add_special_tokens=False).ids, ascii(text[:50])


@settings(deadline=None, max_examples=300)
@given(text=ALPHABET)
def test_gpt2_on_any_text(text: str, gpt2: Tokenizer, reference_bpe: HfLibrary) -> None:
    assert gpt2.encode(text) == reference_bpe.encode(text, add_special_tokens=False).ids


def test_the_real_gpt2_against_transformers(shared: Callable[[str], Path]) -> None:
    transformers = pytest.importorskip("transformers")
    vocab_file, merge_file = shared("gpt2_bpe/vocab.json"), shared("gpt2_bpe/merges.txt")
    ours = build_tokenizer("gpt2", vocab_file=str(vocab_file), merge_file=str(merge_file))
    theirs = transformers.GPT2TokenizerFast(str(vocab_file), str(merge_file))
    assert (ours.vocab_size, ours.eod, ours.encode("Hello world")) == (50257, 50256, [15496, 995])
    lines = shared("openwebtext/openwebtext-1000.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [*NASTY, *(json.loads(line)["text"] for line in lines[:200])]
    points = random.Random(0).choices([*range(0xD800), *range(0xE000, 0x110000)], k=10_000)
    texts += ["".join(map(chr, points[i : i + 20])) for i in range(0, len(points), 20)]
    for text, ids in zip(texts, ours.encode_batch(texts), strict=True):
        assert ids.tolist() == theirs(text).input_ids, ascii(text[:50])


def test_the_encoder_is_renewed_and_stays_the_same(
    gpt2: Tokenizer, sample_text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = gpt2.encode(sample_text)
    monkeypatch.setattr(tokenizer_gpt2, "_RENEW_AFTER_CHARS", 10)
    first = gpt2._encoder  # type: ignore[attr-defined]
    assert gpt2.encode(sample_text) == before
    assert gpt2._encoder is not first  # type: ignore[attr-defined]


def test_neox_against_the_library(shared: Callable[[str], Path]) -> None:
    path = shared("neox/20B_tokenizer.json")
    ours, theirs = build_tokenizer("hf", model=str(path)), HfLibrary.from_file(str(path))
    assert (ours.vocab_size, ours.eod) == (50277, 0)
    for text in NASTY:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    # The text comes back where it was normalised already; spaces in a row are tokens there.
    text = "def f():\n        return 'naïve 日本' \n"
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    assert int(ours.token_bytes()[ids].sum()) == len(text.encode())


def test_t5_against_the_library(shared: Callable[[str], Path]) -> None:
    path = shared("sentencepiece/t5_tokenizer_base.model")
    ours = build_tokenizer("sentencepiece", model=str(path))
    theirs = SentencePieceProcessor(model_file=str(path))
    assert (ours.vocab_size, ours.eod) == (32000, 1)
    assert [ids.tolist() for ids in ours.encode_batch(NASTY)] == [theirs.encode(text) for text in NASTY]


@settings(deadline=None, max_examples=100)
@given(text=ALPHABET.filter(lambda text: "\u2581" not in text and "<|endoftext|>" not in text))
def test_texts_come_back_and_bytes_add_up(text: str, all_kinds: list[Tokenizer]) -> None:
    """U+2581 is SentencePiece's own space, the one character that it does not give back."""
    for tokenizer in all_kinds:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text, tokenizer.kind
        assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode()), tokenizer.kind


def test_all_kinds_keep_the_protocol(all_kinds: list[Tokenizer]) -> None:
    for tokenizer in all_kinds:
        batch = tokenizer.encode_batch(NASTY)
        assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in NASTY]
        assert all(np.issubdtype(ids.dtype, np.integer) for ids in batch if len(ids))
        assert max(int(ids.max()) for ids in batch if len(ids)) < tokenizer.vocab_size
        assert tokenizer.token_bytes().shape == (tokenizer.vocab_size,)
        assert tokenizer.eod is not None and tokenizer.token_bytes()[tokenizer.eod] == 0
        assert tokenizer.decode([*tokenizer.encode("a\u0301"), *tokenizer.encode("日")[:1]]).startswith("a\u0301")
    assert len({tokenizer.sha256 for tokenizer in all_kinds}) == 4


def test_ids_that_only_the_model_has_are_no_text(all_kinds: list[Tokenizer]) -> None:
    """A vocabulary padded by others is larger than the tokenizer's; such an id may be drawn, or sent by a client."""
    for tokenizer in all_kinds:
        ids = tokenizer.encode("abc")
        assert tokenizer.decode([*ids, tokenizer.vocab_size, tokenizer.vocab_size + 99]) == tokenizer.decode(ids)


def test_byte_alphabet_is_that_of_the_library() -> None:
    alphabet = byte_alphabet()
    assert set(alphabet) == set(pre_tokenizers.ByteLevel.alphabet()) and set(alphabet.values()) == set(range(256))


def test_eod_of_hf_is_what_its_configuration_says(hf_file: Path, tmp_path: Path) -> None:
    shutil.copy(hf_file, tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    tokenizer = build_tokenizer("hf", model=str(tmp_path))
    assert tokenizer.eod == tokenizer.encode("a")[0]


def test_unknown_kind() -> None:
    with pytest.raises(UserError, match="gpt2, sentencepiece, hf, bytes"):
        build_tokenizer("word")


def test_tokenizer_of_a_dataset(dataset_prefix: str, tmp_path: Path, hf_file: Path) -> None:
    found = tokenizer_for(DataConfig(), dataset_prefix)
    assert found is not None and found.kind == "bytes"
    with pytest.raises(UserError, match=rf"tokenizer hf with SHA-256 .*{dataset_prefix}.json records bytes"):
        tokenizer_for(DataConfig(tokenizer="hf", tokenizer_model=str(hf_file)), dataset_prefix)
    Path(f"{dataset_prefix}.json").unlink()
    assert tokenizer_for(DataConfig(), dataset_prefix) is None
    named = tokenizer_for(DataConfig(tokenizer="hf", tokenizer_model=str(hf_file)), dataset_prefix)
    assert named is not None and named.kind == "hf"


def test_files_that_moved_or_changed(tmp_path: Path, gpt2_files: tuple[Path, Path], run_tool) -> None:
    for path in gpt2_files:
        shutil.copy(path, tmp_path)
    vocab_file, merge_file = tmp_path / "vocab.json", tmp_path / "merges.txt"
    (tmp_path / "data").mkdir()
    (tmp_path / "in.txt").write_text("hello")
    prefix = f"{tmp_path}/data/a_text_document"
    run_tool(
        "preprocess_data", "--input", tmp_path / "in.txt", "--output-prefix", tmp_path / "data" / "a",
        "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", vocab_file, "--merge-file", merge_file,
    ).succeeded()  # fmt: skip
    assert tokenizer_for(DataConfig(), prefix) is not None
    vocab_file.rename(tmp_path / "elsewhere.json")
    with pytest.raises(UserError, match=r"vocab\.json: cannot be read"):
        tokenizer_for(DataConfig(), prefix)
    assert tokenizer_for(DataConfig(vocab_file=str(tmp_path / "elsewhere.json")), prefix) is not None
    shutil.copy(tmp_path / "elsewhere.json", tmp_path / "data" / "vocab.json")
    assert tokenizer_for(DataConfig(), prefix) is not None  # beside the data
    merge_file.write_bytes(merge_file.read_bytes().rsplit(b"\n", 2)[0] + b"\n")
    with pytest.raises(UserError, match="did not write this dataset"):
        tokenizer_for(DataConfig(), prefix)
