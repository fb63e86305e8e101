"""From tokens to text as they come: never half a character, and never more than a stop string leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megagpt.data.tokenizers.tokenizer import Tokenizer


CONTEXT = 6  # tokens before the new ones that are decoded with them: a tokenizer may treat the first one differently
UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what decoding makes of bytes that are no whole character


class TextStream:
    """The text of one sample, piece by piece.

    Decoding all tokens at every step would take time that grows with the square of the text: what is decoded is a
    window that starts a few tokens before the last piece, and the new text is by how much it has grown.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.tokens = list(prompt[-CONTEXT:])
        self.known = tokenizer.decode(self.tokens).rstrip(UNFINISHED)  # the text of those tokens
        self.held = ""  # text that a stop string may begin in
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that can be shown after one more token; where a stop string is whole, what precedes it."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens)
        if text.endswith(UNFINISHED):
            return ""
        return self._grown(text)

    def end(self) -> str:
        """What was held back, at the end of the text: half a character is U+FFFD then."""
        if self.stopped:
            return ""
        rest = self.held + self.tokenizer.decode(self.tokens)[len(self.known) :]
        self.held = ""
        return rest

    def _grown(self, text: str) -> str:
        new, self.known = text[len(self.known) :], text
        if len(self.tokens) > 4 * CONTEXT:
            self.tokens = self.tokens[-CONTEXT:]
            self.known = self.tokenizer.decode(self.tokens)
        return self._before_stop(self.held + new)

    def _before_stop(self, text: str) -> str:
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self.held = True, ""
            return text[: min(found)]
        n_held = max((_overlap(text, stop) for stop in self.stop), default=0)
        self.held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of text that stop begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
