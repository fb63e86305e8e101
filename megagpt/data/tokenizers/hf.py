"""Any tokenizer of Hugging Face's `tokenizer.json` format, encoded by their own library.

gigatoken would be faster, but on 3 of 20,000 random strings its Unicode normalisation differed from that of
this library for the GPT-NeoX tokenizer. The ids of a `tokenizer.json` are what this library says they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
    parse_json_object,
    read_tokenizer_file,
)
from megagpt.errors import UserError

_EOD_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")


class HfTokenizer:
    """A `tokenizer.json`, given itself or by its folder. Templates (tokens at the ends) are not applied."""

    kind: ClassVar[str] = "hf"
    options: ClassVar[tuple[FileOption, ...]] = (FileOption("model", "--tokenizer-model", "tokenizer.json"),)
    transformers_settings: ClassVar[dict[str, Any]] = {"tokenizer_class": "PreTrainedTokenizerFast"}

    def __init__(self, path: Path) -> None:
        folder = path if path.is_dir() else None
        path = folder / "tokenizer.json" if folder else path
        data = read_tokenizer_file(path)
        definition = parse_json_object(path, data)
        config = _config(path.parent / "tokenizer_config.json")
        _refuse_remote_code(path, definition)
        if folder:
            _refuse_remote_code(folder / "tokenizer_config.json", config)
        self.files: tuple[Path, ...] = (path,)
        self.sha256 = files_sha256(self.kind, (data,))
        self.vocab_size = check_ids(path, _entries(path, definition))
        try:
            self._tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises the bare class
            raise UserError(f"{path}: not a tokenizer ({error}); {REDO}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.eod = self._find_eod(config)

    def encode(self, text: str) -> list[int]:
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
        named = config.get("eos_token")
        named = named.get("content") if isinstance(named, dict) else named
        for name in (named, *_EOD_NAMES):
            if isinstance(name, str) and (i := self._tokenizer.token_to_id(name)) is not None:
                return i
        return None


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
