"""What is served: a model's name and sizes, and its tokenizer as clients see it. No torch in what it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from megagpt.data.tokenizers.tokenizer import UNBOUND, Bounds, Tokenizer
from megagpt.serve.api_error import ApiError
from megagpt.serve.chat import ChatTemplate

UNNAMED_END = "<|endoftext|>"  # of a tokenizer that decodes its end of text to nothing
ANCHOR = "a"  # a token's text is what it adds to this one's: some tokenizers drop a space in front


@dataclass(frozen=True)
class Served:
    """name: as clients call it.  n_places: tokens of its context.  max_texts: that may wait and be written at once.

    template: None where the tokenizer brings none.  created: seconds since 1970.  bounds: `Trained.bounds`.
    """

    name: str
    tokenizer: Tokenizer | None
    vocab_size: int
    n_places: int
    max_texts: int
    template: ChatTemplate | None = None
    created: int = 0
    bounds: Bounds = UNBOUND

    def check_name(self, name: str | None) -> None:
        """Raises ApiError 404 for another model; who names none means this one."""
        if name not in (None, self.name):
            message = f"got model {name!r:.100}, wanted {self.name!r}, the one that is served; GET /v1/models lists it"
            raise ApiError(404, message, "model", "model_not_found")

    def needed_tokenizer(self) -> Tokenizer:
        """Raises ApiError 400 where there is none."""
        if self.tokenizer is None:
            raise ApiError(
                400, "the model has no tokenizer, which text needs; give token ids", "prompt", "no_tokenizer"
            )
        return self.tokenizer

    @cached_property
    def end_of_text(self) -> str | None:
        """The token that ends a text, in words; None where there is none."""
        if self.tokenizer is None or self.tokenizer.eod is None:
            return None
        return self.tokenizer.decode([self.tokenizer.eod]) or UNNAMED_END

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Of `end_of_text` alone, its one id, by whatever tokenizer."""
        tokenizer = self.needed_tokenizer()
        return [tokenizer.eod] if tokenizer.eod is not None and text == self.end_of_text else tokenizer.encode(text)

    def begun(self, text: str) -> list[int]:
        """Ids of a text as the model has it begin."""
        return list(self.bounds.begun(self.encode(text)))

    def prompt(self, text: str) -> list[int]:
        """Ids of a text to go on from: an empty one, where no token begins a text, is what follows another's end."""
        return self.begun(text) or self.encode(self.end_of_text or "")

    def unseen(self, text: str, ids: Sequence[int]) -> int:
        """Characters of the token that a prompt begins with, where its text does not name it."""
        first = tuple(ids[: len(self.bounds.begin) or 1])
        if self.tokenizer is None or first not in (self.bounds.begin, (self.tokenizer.eod,)):
            return 0
        named = "".join(map(self.token_text, first))
        return 0 if text.startswith(named) else len(named)

    def decode(self, tokens: Sequence[int], param: str = "tokens") -> str:
        """Their text, "" without a tokenizer. Raises ApiError 400, of the field param, for an id that is none."""
        strange = [token for token in tokens if not 0 <= token < self.vocab_size]
        if strange:
            message = (
                f"got token id {strange[0]}, wanted 0 to {self.vocab_size - 1}; give ids of the model's vocabulary"
            )
            raise ApiError(400, message, param)
        return self.tokenizer.decode(tokens) if self.tokenizer else ""

    def token_text(self, token: int) -> str:
        """One token in words: U+FFFD for a part of a character, "token_id:7" without a tokenizer."""
        if self.tokenizer is None:
            return f"token_id:{token}"
        if token == self.tokenizer.eod:
            return self.end_of_text or ""
        return self.tokenizer.decode([*self._anchor, token])[len(ANCHOR) :]

    @cached_property
    def _anchor(self) -> list[int]:
        return self.needed_tokenizer().encode(ANCHOR)
