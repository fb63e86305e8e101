"""Tokenizers of every kind give our ids in transformers, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from sentencepiece import SentencePieceTrainer

from megagpt.data.tokenizers.tokenizer import Tokenizer, build_tokenizer
from megagpt.errors import UserError
from megagpt.hf.export_tokenizer import write_tokenizer

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


def test_what_has_no_form_there_is_refused_and_leaves_nothing(tmp_path: Path):
    ours = sentencepiece(tmp_path, model_type="unigram", treat_whitespace_as_suffix=True)
    with pytest.raises(UserError, match=r"no form of this sentencepiece tokenizer .*--without-tokenizer"):
        written(tmp_path / "hf", ours)
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["config.json"]
