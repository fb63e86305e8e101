"""Any tokenizer of Hugging Face's `tokenizer.json` format, encoded by their own library.

gigatoken would be faster, but on 3 of 20,000 random strings its Unicode normalisation differed from that of
this library for the GPT-NeoX tokenizer. The ids of a `tokenizer.json` are what this library says they are.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tokenizers import Tokenizer

from megagpt.data.tokenizers.files import (
    REDO,
    FileOption,
    byte_alphabet,
    check_ids,
    files_sha256,
    other_kind,
    parse_json_object,
    read_tokenizer_file,
)
from megagpt.errors import UserError

_MOST_GROWTH = 1024  # times the characters of a text, by what its normalizer and decoder put in place of others
_EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")


class HfTokenizer:
    """A `tokenizer.json`, given itself or by its folder. Templates (tokens at the ends) are not applied."""

    kind: ClassVar[str] = "hf"
    options: ClassVar[tuple[FileOption, ...]] = (FileOption("model", "--tokenizer-model", "tokenizer.json"),)

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else None
        path = folder / "tokenizer.json" if folder else path
        data = read_tokenizer_file(path)
        if what := other_kind(self.kind, data):
            raise UserError(f"{path}: {what}")
        definition = parse_json_object(path, data)
        config = _config(path.parent / "special_tokens_map.json") | _config(path.parent / "tokenizer_config.json")
        _refuse_remote_code(path, definition)
        _refuse_growth(path, definition)
        if folder:
            _refuse_remote_code(folder / "tokenizer_config.json", config)
        self.files: tuple[Path, ...] = (path,)
        # Whether special tokens come of text: of none in what we export, and in few tokenizers of others.
        splits_special_tokens = config.get("split_special_tokens") is True
        self.sha256 = files_sha256(self.kind, (data, b"split_special_tokens") if splits_special_tokens else (data,))
        self.vocab_size = check_ids(path, _entries(path, definition))
        with _refusing(f"{path}: not a tokenizer"):
            self._tokenizer = Tokenizer.from_buffer(data)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = splits_special_tokens
        self.eod = self._find_eod(config)
        self.unknown = self._find_unknown(definition["model"])
        self._config = config

    @property
    def transformers_settings(self) -> dict[str, Any]:
        return self._config | {"tokenizer_class": "PreTrainedTokenizerFast"}

    @property
    def has_template(self) -> bool:
        """Whether the file says which tokens stand at the ends of a text, for those who apply that."""
        return self._tokenizer.num_special_tokens_to_add(is_pair=False) > 0

    @property
    def begin(self) -> tuple[int, ...]:
        """What its template puts before a text."""
        whole = self._tokenizer.encode("a")
        return tuple(i for i, _ in takewhile(itemgetter(1), zip(whole.ids, whole.special_tokens_mask, strict=True)))

    def id_of(self, token: str) -> int | None:
        """The id of a token by its name; None where there is none."""
        return self._tokenizer.token_to_id(token)

    def encode(self, text: str) -> list[int]:
        with _refusing(f"{self.files[0]}: cannot encode a text"):
            return self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids  # no offsets

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        # One by one: the library would start a thread per core, and that in every worker process.
        return [np.array(self.encode(text), np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        counts = np.zeros(self.vocab_size, np.int32)
        added = self._tokenizer.get_added_tokens_decoder()
        is_byte_level = "ByteLevel" in str(self._tokenizer.decoder)
        alphabet = byte_alphabet()
        for token, i in self._tokenizer.get_vocab().items():
            if i in added:
                counts[i] = 0 if added[i].special else len(added[i].content.encode())
            elif is_byte_level and all(character in alphabet for character in token):
                counts[i] = len(token)
            else:
                counts[i] = piece_bytes(token)
        return counts

    def _find_eod(self, config: dict) -> int | None:
        """The end-of-sequence token that tokenizer_config.json names, else the first usual one there is."""
        names = (token_name(config.get("eos_token")), *_EOD_NAMES)
        return next((i for name in names if name and (i := self.id_of(name)) is not None), None)

    def _find_unknown(self, model: dict) -> int | None:
        """Named by its id in a Unigram model, by itself in the others."""
        i, token = model.get("unk_id"), model.get("unk_token")
        return i if isinstance(i, int) else self.id_of(token) if isinstance(token, str) else None


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """The library raises the bare Exception, and for a panic of its Rust code something that is none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({error}); {REDO}") from None


def token_name(token: object) -> str | None:
    """The text of a token as tokenizer_config.json names it: by itself, or with how it is matched."""
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def piece_bytes(piece: str) -> int:
    """UTF-8 bytes of the text behind a SentencePiece-style piece: ▁ is a space, <0x0A> one byte."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return 1
    return len(piece.replace("\u2581", " ").encode())


def _entries(path: Path, definition: dict) -> Iterator[tuple[str, object]]:
    """(token, id) of a tokenizer.json: of its model, then of what was added to it."""
    model = definition.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        yield from vocab.items()
    elif isinstance(vocab, list):  # Unigram: [piece, score], the id is the position
        yield from ((str(entry[0]), i) for i, entry in enumerate(vocab) if isinstance(entry, list) and entry)
    else:
        raise UserError(f"{path}: key model.vocab is missing; give a tokenizer.json")
    for token in definition.get("added_tokens") or ():
        yield token.get("content"), token.get("id")


def _config(path: Path) -> dict:
    return parse_json_object(path, read_tokenizer_file(path)) if path.exists() else {}


def _refuse_remote_code(path: Path, values: dict) -> None:
    if "auto_map" in values:
        raise UserError(
            f"{path}: key 'auto_map' asks to run code that comes with it, which megagpt never does; "
            "give a tokenizer.json that is complete in itself"
        )


def _refuse_growth(path: Path, definition: dict) -> None:
    """What is replaced again and again may grow without bounds: `a` by `aa` 40 times makes a terabyte of a letter."""
    growth, parts = 1.0, [definition.get("normalizer"), definition.get("pre_tokenizer"), definition.get("decoder")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            parts.extend(part.values())
            if part.get("type") == "Replace":
                growth *= _growth(part.get("pattern"), part.get("content"))
            elif part.get("type") == "Prepend":
                growth *= 1 + len(str(part.get("prepend")))
            elif part.get("type") == "Precompiled":
                _check_characters(path, part.get("precompiled_charsmap"))
        elif isinstance(part, list):
            parts.extend(part)
    if growth > _MOST_GROWTH:
        raise UserError(
            f"{path}: its replacements can make a text {growth:.3g} times as long, at most {_MOST_GROWTH} may; {REDO}"
        )


def _check_characters(path: Path, table: object) -> None:
    """SentencePiece's table of characters: the size of its index, in bytes, and the index. The library believes it."""
    try:
        data = base64.b64decode(str(table), validate=True)
    except ValueError:
        data = b""
    size = int.from_bytes(data[:4], "little")
    if len(data) < 4 or size == 0 or size % 4 or size > len(data) - 4:
        raise UserError(f"{path}: its precompiled_charsmap has {len(data)} bytes and announces {size}; {REDO}")


def _growth(pattern: object, content: object) -> float:
    text = pattern.get("String") if isinstance(pattern, dict) else None
    length = len(content) if isinstance(content, str) else 0
    if not isinstance(text, str):
        return 1.0 + length  # a regular expression also finds nothing, before every character
    return max(1.0, length / max(1, len(text)))
