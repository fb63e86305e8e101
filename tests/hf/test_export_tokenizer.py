"""Tokenizers of every kind give our ids in transformers, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from sentencepiece import SentencePieceTrainer

from megagpt.data.tokenizers.files import byte_alphabet
from megagpt.data.tokenizers.tokenizer import Tokenizer, build_tokenizer, tokenizer_of_run
from megagpt.errors import UserError
from megagpt.hf.export_tokenizer import write_tokenizer
from megagpt.hf.tokenizer_folder import copy_tokenizer, find_tokenizer

# What is in no sample of the exporter.
TEXTS = [
    *Path(__file__).read_text(encoding="utf-8").splitlines(),
    "",
    " ",
    "  Ünïcödé ﬃ … \u0085 ½ ﷽ ǆ \ud7ff \U0001f9d1\u200d\U0001f680 x\u0301",
    "</s><s><unk><|endoftext|><0x41>▁▁<x>def",
]


def written(folder: Path, tokenizer: Tokenizer, architecture: str = "llama") -> Any:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": architecture}))
    write_tokenizer(folder, tokenizer, 64)
    return transformers.AutoTokenizer.from_pretrained(folder)


def require_same(theirs: Any, ours: Tokenizer) -> None:
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        if ours.decode(ids) == text:
            assert theirs.decode(ids) == text
    assert theirs.eos_token_id == ours.eod


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "openai-gpt"])
def test_bytes(tmp_path: Path, architecture: str):
    ours = build_tokenizer("bytes")
    theirs = written(tmp_path / "hf", ours, architecture)
    require_same(theirs, ours)
    assert theirs(TEXTS[0])["input_ids"] == list(TEXTS[0].encode())
    assert theirs.decode([*b"\x00\xff", 256]) == "\x00\ufffd<|endoftext|>"


MODELS: dict[str, dict[str, Any]] = {
    "bpe": {"model_type": "bpe"},
    "bpe that keeps all": {
        "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    },
    "unigram": {"model_type": "unigram"},
    "unigram of bytes": {"model_type": "unigram", "byte_fallback": True, "remove_extra_whitespaces": False},
    "unigram that folds case": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc_cf"},
    "unigram with symbols": {
        "model_type": "unigram", "add_dummy_prefix": False, "user_defined_symbols": ["<x>", "def"],
    },
    "unigram without ends": {"model_type": "unigram", "bos_id": -1, "eos_id": -1},
    "characters": {"model_type": "char"},
}  # fmt: skip


def sentencepiece(folder: Path, **settings: Any) -> Tokenizer:
    SentencePieceTrainer.train(
        input=__file__, model_prefix=f"{folder}/m", vocab_size=400, hard_vocab_limit=False, minloglevel=2, **settings
    )
    return build_tokenizer("sentencepiece", model=f"{folder}/m.model")


@pytest.mark.parametrize("name", MODELS)
def test_sentencepiece_models_of_ones_own(tmp_path: Path, name: str):
    ours = sentencepiece(tmp_path, **MODELS[name])
    require_same(written(tmp_path / "hf", ours), ours)


@pytest.mark.parametrize("name", ["bytes", "sentencepiece"])
def test_what_was_exported_comes_back_and_goes_again(tmp_path: Path, name: str):
    ours = build_tokenizer("bytes") if name == "bytes" else sentencepiece(tmp_path, model_type="bpe")
    written(tmp_path / "hf", ours)
    back, note = find_tokenizer(tmp_path / "hf")
    assert back is not None and note is None and [back.encode(text) for text in TEXTS] == list(map(ours.encode, TEXTS))
    require_same(written(tmp_path / "again", back), ours)


@pytest.mark.parametrize("kind", ["gpt2", "hf"])
def test_chat_template_and_names_of_special_tokens_come_through(tmp_path: Path, kind: str):
    (source := tmp_path / "source").mkdir()
    vocab = {**byte_alphabet(), "<|endoftext|>": 256}
    (source / "vocab.json").write_text(json.dumps(vocab))
    (source / "merges.txt").write_text("#version: 0.2\n")
    transformers.GPT2Tokenizer.from_pretrained(source).backend_tokenizer.save(str(source / "tokenizer.json"))
    (source / "tokenizer_config.json").write_text('{"pad_token": "<|endoftext|>", "model_max_length": 7}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "config.json").write_text('{"bos_token_id": 256, "eos_token_id": 256}')
    if kind == "hf":
        (source / "vocab.json").unlink()
    found, _ = find_tokenizer(source)
    assert found is not None and found.kind == kind
    tokenizer = tokenizer_of_run(copy_tokenizer(source, found, tmp_path / "run", tmp_path / "run"))
    assert tokenizer is not None
    theirs = written(tmp_path / "hf", tokenizer, "gpt2")
    assert (theirs.chat_template, theirs.pad_token_id, theirs.bos_token_id) == ("{{ messages }}", 256, 256)


def test_what_has_no_form_there_is_refused_and_leaves_nothing(tmp_path: Path):
    ours = sentencepiece(tmp_path, model_type="unigram", treat_whitespace_as_suffix=True)
    with pytest.raises(UserError, match=r"no form of this sentencepiece tokenizer .*--without-tokenizer"):
        written(tmp_path / "hf", ours)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["config.json"]
