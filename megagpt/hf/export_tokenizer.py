"""A tokenizer in files that give our ids in transformers: its own ones, or a tokenizer.json made of them.

Which class of transformers reads a folder depends on its config.json too, and classes have rules of their own. So what
is written is read by transformers and compared on a sample; the first form that gives our ids is taken.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megagpt.data.tokenizers.files import byte_alphabet, read_tokenizer_file
from megagpt.data.tokenizers.kept import copy_files
from megagpt.data.tokenizers.same import SAMPLE
from megagpt.data.tokenizers.tokenizer import Tokenizer
from megagpt.errors import UserError
from megagpt.files import delete
from megagpt.hf.sentencepiece_as_json import definition_of_sentencepiece
from megagpt.hf.tokenizer_folder import CHAT_TEMPLATE, settings_in, special_ids

_ONE_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_END = "<|endoftext|>"  # what the end of a document is called where the tokenizer has no name for it

_TEXTS = (
    " leading, trailing and  inner   blanks \n\n\t\r\n \u00a0\u3000 end  ",
    "e\u0301 é ﬁ Å Ⅳ \uff46\uff55\uff4c\uff4c ﷺ 🙂 👩\u200d👩\u200d👧 שלום नमस्ते ไทย \u200b\ufeff \x00\x07\x1b",
    "<|endoftext|> <s> </s> <unk> <pad> [INST] <0x0A> ▁ <|im_start|>",
)


def write_tokenizer(folder: Path, tokenizer: Tokenizer, seq_len: int) -> None:
    """Write the tokenizer into a folder of transformers that has its config.json.

    Raises UserError where transformers reads no form of it as the same tokenizer.
    """
    trial = folder / "tokenizer.tmp"
    for form in _forms(tokenizer):
        try:
            trial.mkdir()
            shutil.copyfile(folder / "config.json", trial / "config.json")
            settings = {**_handed_on(tokenizer, trial), **form(trial, tokenizer)}
            if _is_same(trial, tokenizer, {**settings, "model_max_length": seq_len}):
                (trial / "config.json").unlink()
                for path in trial.iterdir():
                    path.rename(folder / path.name)
                return
        finally:
            delete(trial)
    raise UserError(
        f"transformers reads no form of this {tokenizer.kind} tokenizer as one that gives the same ids; "
        "export the weights alone: --without-tokenizer"
    )


def _handed_on(tokenizer: Tokenizer, folder: Path) -> dict[str, Any]:
    """What lies beside a tokenizer's files and says nothing of ids: copies its chat template, returns settings."""
    if not tokenizer.files:
        return {}
    beside = tokenizer.files[0].parent
    if (beside / CHAT_TEMPLATE).exists():
        shutil.copyfile(beside / CHAT_TEMPLATE, folder / CHAT_TEMPLATE)
    return {key: value for key, value in settings_in(beside).items() if key in ("chat_template", "pad_token")}


Form = Callable[[Path, Tokenizer], dict[str, Any]]
"""Writes a tokenizer's files into a folder; returns the settings of its tokenizer_config.json."""


def _forms(tokenizer: Tokenizer) -> Sequence[Form]:
    return {
        "gpt2": (_gpt2,),
        "sentencepiece": (_own_files, _sentencepiece_in_one),
        "hf": (_own_files,),
        "bytes": (_bytes_in_one,),
    }[tokenizer.kind]


def _own_files(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    copy_files(tokenizer, folder)
    return tokenizer.transformers_settings


def _gpt2(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Its two files, and one for architectures that transformers gives no reader of these."""
    settings = _own_files(folder, tokenizer)
    transformers().GPT2Tokenizer.from_pretrained(folder).backend_tokenizer.save(str(folder / _ONE_FILE))
    return settings


def _bytes_in_one(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Byte-level BPE that merges nothing."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    definition = {
        "version": "1.0",
        "added_tokens": [{"id": tokenizer.eod, "content": _END, "special": True, **flags}],
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {**byte_alphabet(), _END: tokenizer.eod}, "merges": []},
    }
    (folder / _ONE_FILE).write_text(json.dumps(definition), encoding="utf-8")
    return _of_one_file(bos_token=_END, eos_token=_END)


def _sentencepiece_in_one(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    definition, names = definition_of_sentencepiece(read_tokenizer_file(tokenizer.files[0]))
    (folder / _ONE_FILE).write_text(definition, encoding="utf-8")
    return _of_one_file(**names)


def _of_one_file(**names: str) -> dict[str, Any]:
    """Settings of a tokenizer.json of ours. Special tokens come of no text, as in our own tokenizer."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        **names,
    }


def _is_same(folder: Path, tokenizer: Tokenizer, settings: dict[str, Any]) -> bool:
    """Whether transformers reads the folder as our tokenizer."""
    try:
        theirs = _read(folder, settings)
        names = {name: theirs.convert_ids_to_tokens(i) for name, i in _unnamed(theirs, tokenizer).items()}
        theirs = _read(folder, {**settings, **names}) if names else theirs
        if _unnamed(theirs, tokenizer):
            return False
        for text in (SAMPLE, *_TEXTS, *_texts_of_all_tokens(tokenizer)):
            ours = tokenizer.encode(text)
            if theirs(text, add_special_tokens=False)["input_ids"] != ours:
                return False
            if tokenizer.decode(ours) == text != theirs.decode(ours):
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError):  # raised for files of another kind
        return False
    return True


def _unnamed(theirs: Any, tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that begin and end a text, by what transformers calls them, where it calls another or none so."""
    begin, end = special_ids(tokenizer)["bos_token_id"], tokenizer.eod
    ids = {"eos_token": end} if end is not None and theirs.eos_token_id != end else {}
    if theirs.bos_token_id is None and isinstance(begin, int) and begin < tokenizer.vocab_size:
        ids["bos_token"] = begin
    return ids


def _read(folder: Path, settings: dict[str, Any]) -> Any:
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _texts_of_all_tokens(tokenizer: Tokenizer) -> list[str]:
    """Every token of the vocabulary, in an order that puts those together which no text would."""
    ids = list(range(tokenizer.vocab_size))
    random.Random(0).shuffle(ids)
    parts = [ids[first : first + 256] for first in range(0, len(ids), 256)]
    return [tokenizer.decode(i for i in part if i != tokenizer.eod) for part in parts]


def transformers() -> Any:
    """The library, quiet.  Raises UserError where it is not installed."""
    try:
        import transformers  # an extra, and seconds to load
    except ImportError:
        raise UserError(
            "transformers is not installed, which the export is compared with: pip install megagpt[hf]"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers
