"""Which tokenizer a Hugging Face folder has: all that its files say of it, or a word on why there is none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from megagpt.data.tokenizers.same import same_ids
from megagpt.data.tokenizers.tokenizer import Bounds, build_tokenizer, tokenizer_of_run
from megagpt.errors import UserError
from megagpt.hf.tokenizer_folder import bounds_of, copy_tokenizer, find_tokenizer, special_ids

TEXT = "In 1984:    37.8 <|im_start|>user\n\nHi<|im_end|><|endoftext|>"
CHAT = ["<|im_start|>", "<|im_end|>", "[PAD]"]


def byte_level(digits: bool = False) -> Tokenizer:
    """A byte-level BPE of 300 tokens, as GPT-2's; with digits apart, as SmolLM's."""
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if digits else parts[0]
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        ["19 37     84   1984    3784 the user then " * 9],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, one_file: bool = True, **others: object) -> Path:
    """A folder of transformers: the two files, tokenizer.json and whatever JSON."""
    folder.mkdir()
    tokenizer.model.save(str(folder))
    if one_file:
        tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in others.items():
        (folder / f"{name}.json").write_text(json.dumps(values))
    return folder


def test_the_pair_serves_where_it_gives_the_same_ids(tmp_path: Path):
    plain = byte_level()
    found, note = find_tokenizer(write(tmp_path / "plain", plain))
    assert found is not None and (found.kind, note) == ("gpt2", None)
    assert found.encode(TEXT) == plain.encode(TEXT).ids


def test_tokenizer_json_goes_before_a_pair_that_splits_digits_otherwise(tmp_path: Path):
    smol = byte_level(digits=True)
    found, note = find_tokenizer(write(tmp_path / "smol", smol))
    assert found is not None and (found.kind, note) == ("hf", None)
    assert found.encode(TEXT) == smol.encode(TEXT).ids
    pair = build_tokenizer("gpt2", **{f: str(tmp_path / "smol" / n) for f, n in PAIR.items()})
    assert pair.encode(TEXT) != found.encode(TEXT) and not same_ids(pair, found)


PAIR = {"vocab_file": "vocab.json", "merge_file": "merges.txt"}


def test_added_tokens_and_the_ends_of_texts_come_along(tmp_path: Path):
    chat = byte_level()
    chat.add_special_tokens(CHAT)
    n = chat.get_vocab_size()
    source = write(
        tmp_path / "chat",
        chat,
        tokenizer_config={"eos_token": {"content": "<|im_end|>"}, "pad_token": "[PAD]", "chat_template": "{{ x }}"},
        config={"bos_token_id": 0, "eos_token_id": n - 1, "vocab_size": n},
        generation_config={"eos_token_id": [n - 2, 0], "temperature": 0.6},
    )
    found, note = find_tokenizer(source)
    assert found is not None and (found.kind, note) == ("hf", None)
    data = copy_tokenizer(source, found, tmp_path / "copy", tmp_path / "copy")
    copied = tokenizer_of_run(data)
    assert copied is not None and copied.sha256 == found.sha256 and copied.eod == n - 2
    assert copied.encode(TEXT) == chat.encode(TEXT).ids and copied.decode(copied.encode(TEXT)) == TEXT
    assert special_ids(copied) == {"bos_token_id": 0, "eos_token_id": [n - 2, 0]}
    settings = copied.transformers_settings
    assert (settings["eos_token"]["content"], settings["chat_template"]) == ("<|im_end|>", "{{ x }}")


@pytest.mark.parametrize(
    ("kind", "settings", "begin"),
    [
        ("hf", {}, (0,)),
        ("gpt2", {}, ()),
        ("gpt2", {"add_bos_token": True}, (0,)),
        ("hf", {"add_bos_token": True, "bos_token": "t"}, None),
        ("hf", {"add_bos_token": False}, ()),
    ],
)
def test_what_begins_and_ends_a_text_comes_along(tmp_path: Path, kind: str, settings: dict, begin: tuple | None):
    whole = byte_level()
    if kind == "hf":
        whole.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A <|endoftext|>", special_tokens=[("<|endoftext|>", 0)]
        )
    ids = {"bos_token_id": 0, "eos_token_id": [7, 0]}
    source = write(
        tmp_path / "bos", whole, tokenizer_config=settings | {"chat_template": "{{ x }}"}, generation_config=ids
    )
    found, _ = find_tokenizer(source)
    assert found is not None and found.kind == kind
    wanted = Bounds((found.encode("t")[0],) if begin is None else begin, (0, 7))
    assert bounds_of(found, source) == wanted
    copied = tokenizer_of_run(copy_tokenizer(source, found, tmp_path / "copy", tmp_path / "copy"))
    assert copied is not None and bounds_of(copied, tmp_path / "copy") == wanted
    assert json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())["chat_template"] == "{{ x }}"


def test_a_folder_without_tokenizer_says_what_ends_a_text(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 2, "bos_token_id": 1}')
    assert bounds_of(None, tmp_path) == Bounds((), (2,))


def gpt1() -> Tokenizer:
    """Words end in </w>, and case is lost."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(["the user then said hi " * 9], trainer)
    return tokenizer


def test_gpt_1_is_read_by_tokenizer_json_or_left_out(tmp_path: Path):
    found, note = find_tokenizer(write(tmp_path / "whole", gpt1()))
    assert found is not None and note is None and found.encode("The user") == gpt1().encode("The user").ids
    found, note = find_tokenizer(write(tmp_path / "pair", gpt1(), one_file=False))
    assert found is None and note is not None
    assert f"{tmp_path}/pair/vocab.json is not of byte-level BPE" in note and "save_pretrained" in note


@pytest.mark.parametrize(
    ("others", "words"),
    [
        ({"added_tokens": {"<|im_start|>": 300}}, "'<|im_start|>' is added"),
        ({"tokenizer_config": {"added_tokens_decoder": {"300": {"content": "[PAD]"}}}}, "'[PAD]' is added"),
        ({"special_tokens_map": {"eos_token": "</s>"}}, "'</s>' is a special token"),
        ({"tokenizer_config": {"bos_token": {"content": "<s>"}}}, "'<s>' is a special token"),
        ({"tokenizer_config": {"tokenizer_class": "Qwen2Tokenizer"}}, "class Qwen2Tokenizer"),
        ({"tokenizer_config": {"add_prefix_space": True}}, "add_prefix_space"),
    ],
)
def test_a_pair_alone_serves_only_where_nothing_says_more(tmp_path: Path, others: dict, words: str):
    found, note = find_tokenizer(write(tmp_path / "more", byte_level(), one_file=False, **others))
    assert found is None and note is not None and words in note and "save_pretrained" in note
    for name in others:
        (tmp_path / "more" / f"{name}.json").unlink()
    found, note = find_tokenizer(tmp_path / "more")
    assert found is not None and (found.kind, note) == ("gpt2", None)


def test_tokens_that_tokenizer_json_lacks_are_not_dropped(tmp_path: Path):
    source = write(tmp_path / "less", byte_level(), added_tokens={"<|im_start|>": 300})
    found, note = find_tokenizer(source)
    assert found is None and note is not None and "tokenizer.json has no '<|im_start|>' of id 300" in note


def test_special_tokens_that_tokenizer_json_lacks_are_not_replaced_by_usual_ones(tmp_path: Path):
    """transformers adds a token of that name; the first usual one that is there would end texts in its place."""
    found, note = find_tokenizer(write(tmp_path / "less", byte_level(), tokenizer_config={"eos_token": "<|im_end|>"}))
    assert found is None and note is not None and "tokenizer.json has no '<|im_end|>'" in note


def test_a_template_of_ends_is_not_given_up_for_speed(tmp_path: Path):
    templated = byte_level()
    templated.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    found, _ = find_tokenizer(write(tmp_path / "templated", templated))
    assert found is not None and found.kind == "hf"


def no_pieces(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"")


def tiktoken(folder: Path) -> None:
    (folder / "tokenizer.model").write_bytes(b"IQ== 33\nIg== 34\n")


def pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(no_pieces, "tokenizer.model: empty"), (pointer, "a pointer of Git LFS in place of the file; fetch that")],
)
def test_damaged_files_are_refused_where_they_lie(tmp_path: Path, spoil: Callable[[Path], None], words: str):
    (tmp_path / "model").mkdir()
    spoil(tmp_path / "model")
    with pytest.raises(UserError, match=words):
        find_tokenizer(tmp_path / "model")


def test_a_tiktoken_file_is_called_so(tmp_path: Path):
    tiktoken(tmp_path)
    found, note = find_tokenizer(tmp_path)
    assert found is None and note is not None and "tokenizer.model is a tiktoken file" in note


def test_single_tokens_that_differ_are_seen(tmp_path: Path):
    """An added token that is normalised otherwise, deep in the vocabulary."""
    one, other = byte_level(), byte_level()
    one.add_tokens([AddedToken("zq", lstrip=True)])
    other.add_tokens([AddedToken("zq")])
    for name, tokenizer in (("one", one), ("other", other)):
        tokenizer.save(str(tmp_path / name))
    a, b = (build_tokenizer("hf", model=str(tmp_path / name)) for name in ("one", "other"))
    assert same_ids(a, a) and not same_ids(a, b)
